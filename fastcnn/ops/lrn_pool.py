"""LRN and max-pool: the operators ``lrn_pool``, ``lrn_pool_codes`` and ``lrn_pool_backward``, and autograd."""

from typing import Any

import torch
from torch import Tensor

from fastcnn.ops import autograd, checks, lrn, max_pool, stock
from fastcnn.ops.codes import unpool
from fastcnn.ops.record import INPUT, POOL, Op, operands, runner
from fastcnn.ops.record import LRN as NORM
from fastcnn.shapes import LRN, Window, memory_format


def reference(*arguments: Any) -> Tensor:
    """Return LRN and max-pool as torch runs them."""
    (input,), norm, pool = OP.split(arguments)
    return stock.pool(lrn.reference(input, *norm), *pool)


def _fake(input: Tensor, size: int, alpha: float, beta: float, k: float, window: Window) -> Tensor:
    return max_pool.fake(input, window)


def _fake_backward(grad: Tensor, codes: Tensor, input: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(input, memory_format=memory_format(input))


def _prepare(*arguments: Any) -> tuple[Tensor, LRN, Window]:
    (input,), norm, pool = OP.split(arguments)
    checks.check_lrn(OP.function, input, *norm)
    checks.check_image(OP.function, input)
    window = max_pool.pool_window(OP.function, "pool_", *pool)
    max_pool.check_window(OP.function, window, "pool_", *input.shape[-3:])
    return input, LRN(*norm), window


def _refuse(input: Tensor, norm: LRN, window: Window) -> str:
    if input.dim() == 3:  # to LRN it is (N, C, L), to max-pool (C, H, W)
        return "takes argument 'input' as (N, C, H, W), got three axes"
    return lrn.refuse(input, norm) or max_pool.refuse(input, window, "pool_size")


OP = Op(
    "lrn_pool", "local_response_norm_max_pool2d", INPUT, NORM, POOL, stock=reference, prepare=_prepare, refuse=_refuse
)
_values = OP.forward(_fake)
_codes = OP.codes(_fake)
_backward = OP.define("lrn_pool_backward", f"(Tensor grad, Tensor codes, {OP.schema}) -> Tensor", _fake_backward)


class LRNPool(torch.autograd.Function):
    """(N, C, H, W) -> pooled normalized values and codes; saves the input and the codes."""

    @staticmethod
    def forward(input: Tensor, norm: LRN, window: Window, backend: str) -> tuple[Tensor, Tensor]:
        return _codes[backend](*operands((input, norm, window)))

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
        return _backward[ctx.backend](*operands((grad, codes, input, ctx.norm, ctx.window))), None, None, None


_run = runner(LRNPool, _values)
lrn_pool = OP.by(lambda route, input, norm, window: _run(input, lrn.kernel_norm(norm), window, route.backend))
