"""LRN and max-pool: the operators ``lrn_pool``, ``lrn_pool_codes`` and ``lrn_pool_backward``, and autograd."""

from typing import Any

import torch
from torch import Tensor

from fastcnn.ops import autograd, checks, lrn, stock
from fastcnn.ops import max_pool as pool
from fastcnn.ops.codes import unpool
from fastcnn.ops.library import define
from fastcnn.route import choose
from fastcnn.shapes import LRN, Size, Window, memory_format


def reference(
    input: Tensor,
    size: int,
    alpha: float,
    beta: float,
    k: float,
    pool_size: Size,
    pool_stride: Size | None,
    pool_padding: Size,
    pool_ceil_mode: bool,
) -> Tensor:
    """Return LRN and max-pool as torch runs them."""
    normalised = lrn.reference(input, size, alpha, beta, k)
    return stock.max_pool(normalised, pool_size, pool_stride, pool_padding, 1, pool_ceil_mode, False)


def _fake(input: Tensor, size: int, alpha: float, beta: float, k: float, *window: Any) -> Tensor:
    return pool.fake(input, *window)


def _fake_codes(*args: Any) -> tuple[Tensor, Tensor]:
    output = _fake(*args)
    return output, torch.empty_like(output, dtype=torch.uint8)


def _fake_backward(grad: Tensor, codes: Tensor, input: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(input, memory_format=memory_format(input))


_NAME = "local_response_norm_max_pool2d"
_SETTINGS = f"{lrn.NORM}, {pool.WINDOW}"
_values = define("lrn_pool", "lrn_pool", f"(Tensor input, {_SETTINGS}) -> Tensor", _fake)
_codes = define(
    "lrn_pool", "lrn_pool_codes", f"(Tensor input, {_SETTINGS}) -> (Tensor output, Tensor codes)", _fake_codes
)
_backward = define(
    "lrn_pool", "lrn_pool_backward", f"(Tensor grad, Tensor codes, Tensor input, {_SETTINGS}) -> Tensor", _fake_backward
)


class LRNPool(torch.autograd.Function):
    """(N, C, H, W) -> pooled normalised values and codes; saves the input and the codes."""

    @staticmethod
    def forward(input: Tensor, norm: LRN, window: Window, backend: str) -> tuple[Tensor, Tensor]:
        return _codes[backend](input, *norm, window.numbers())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        input, ctx.norm, ctx.window, ctx.backend = inputs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(input, output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, None, None, None]:
        if grad is None:
            return None, None, None, None
        input, codes = ctx.saved_tensors
        if autograd.differentiable():
            unpooled = unpool(grad, codes, ctx.window, *input.shape[2:])
            return lrn.stock_backward(unpooled, input, ctx.norm), None, None, None
        return _backward[ctx.backend](grad, codes, input, *ctx.norm, ctx.window.numbers()), None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return autograd.vmap_over_batch(LRNPool, info, in_dims, args)


_apply = autograd.applier(LRNPool)


def lrn_pool(*arguments: Any) -> Tensor:
    """Run ``fastcnn.functional.local_response_norm_max_pool2d``."""
    route, prepared = choose("lrn_pool", _NAME, arguments, _prepare, _refuse)
    if route.backend == "torch":
        return checks.run_stock(reference, _prepare, *arguments)
    input, norm, window = prepared
    norm = lrn.kernel_norm(norm)
    if autograd.needs_grad(input):
        return _apply(input, norm, window, route.backend)[0]
    return _values[route.backend](input, *norm, window.numbers())


def _prepare(input: Tensor, *settings: Any) -> tuple[Tensor, LRN, Window]:
    norm, (size, stride, padding, ceil_mode) = LRN(*settings[:4]), settings[4:]
    checks.check_lrn(_NAME, input, *norm)
    checks.check_image(_NAME, input)
    window = pool.pool_window(_NAME, "pool_", size, stride, padding, 1, ceil_mode)
    pool.check_window(_NAME, window, "pool_", *input.shape[-3:])
    return input, norm, window


def _refuse(input: Tensor, norm: LRN, window: Window) -> str:
    if input.dim() == 3:  # to LRN it is (N, C, L), to max-pool (C, H, W)
        return "takes argument 'input' as (N, C, H, W), got three axes"
    return lrn.refuse(input, norm) or pool.refuse(input, window, "pool_size")
