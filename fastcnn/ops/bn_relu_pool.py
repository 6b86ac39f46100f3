"""Batch norm, ReLU and max-pool: ``bn_relu_pool``, ``bn_relu_pool_codes``, their backward, and autograd.

The statistics are those of ``bn_relu``; the normalised values are never written.
"""

from typing import Any

import torch
from torch import Tensor

from fastcnn.ops import autograd, bn_relu, checks, max_pool, stock
from fastcnn.ops.bn_relu import GRADIENTS, NORM, Norm
from fastcnn.ops.library import define
from fastcnn.route import choose
from fastcnn.shapes import Window


def reference(*arguments: Any) -> Tensor:
    """Return batch norm, ReLU and max-pool as torch runs them."""
    size, stride, padding, ceil_mode = arguments[8:]
    return stock.max_pool(bn_relu.reference(*arguments[:8]), size, stride, padding, 1, ceil_mode, False)


def _fake(input: Tensor, mean: Any, variance: Any, weight: Any, bias: Any, eps: float, *window: Any) -> Tensor:
    return max_pool.fake(input, *window)


def _fake_codes(*args: Any) -> tuple[Tensor, Tensor]:
    output = _fake(*args)
    return output, torch.empty_like(output, dtype=torch.uint8)


def _fake_backward(grad: Tensor, codes: Tensor, input: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return bn_relu.fake_gradients(input)


_NAME = "batch_norm_relu_max_pool2d"
_STEM = "bn_relu_pool"
_SETTINGS = f"{NORM}, {max_pool.WINDOW}"
_values = define(_STEM, "bn_relu_pool", f"(Tensor input, {_SETTINGS}) -> Tensor", _fake)
_codes = define(
    _STEM, "bn_relu_pool_codes", f"(Tensor input, {_SETTINGS}) -> (Tensor output, Tensor codes)", _fake_codes
)
_backward = define(
    _STEM,
    "bn_relu_pool_backward",
    f"(Tensor grad, Tensor codes, Tensor input, {NORM}, bool training, {max_pool.WINDOW}) -> {GRADIENTS}",
    _fake_backward,
)


class BatchNormReLUPool(torch.autograd.Function):
    """(N, C, H, W) -> pooled values and codes; saves the input, the codes and the channels' numbers."""

    @staticmethod
    def forward(
        input: Tensor,
        mean: Tensor,
        variance: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        training: bool,
        window: Window,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        return _codes[backend](input, mean, variance, weight, bias, eps, window.numbers())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.eps, ctx.training, ctx.window, ctx.backend = inputs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*tensors, output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 9
        input, *tensors, codes = ctx.saved_tensors
        mean, variance, weight, bias = tensors
        norm = Norm(mean, variance, weight, bias, ctx.eps, ctx.training)
        if autograd.differentiable():
            (size, stride, padding, _, ceil_mode) = ctx.window
            activations = bn_relu.stock_output(input, norm)
            output = stock.max_pool(activations, size, stride, padding, 1, ceil_mode, False)
            dx, grad_weight, grad_bias = bn_relu.stock_gradients(output, grad, input, norm.weight, norm.bias)
        else:
            dx, grad_weight, grad_bias = _backward[ctx.backend](grad, codes, input, *norm, ctx.window.numbers())
        return dx, None, None, *bn_relu.given(norm, grad_weight, grad_bias), None, None, None, None


_apply = autograd.applier(BatchNormReLUPool)


def bn_relu_pool(*arguments: Any) -> Tensor:
    """Run ``fastcnn.functional.batch_norm_relu_max_pool2d``."""
    input = arguments[0]
    route, prepared = choose("bn_relu_pool", _NAME, arguments, _prepare, _refuse)
    if route.backend == "torch" or input.numel() == 0:
        return checks.run_stock(reference, _prepare, *arguments)
    window = prepared[1]
    norm = bn_relu.prepare(route.backend, *arguments[:8])
    if autograd.needs_grad(input, norm.weight, norm.bias):
        return _apply(input, *norm, window, route.backend)[0]
    return _values[route.backend](input, *norm[:5], window.numbers())


def _prepare(input: Tensor, *settings: Any) -> tuple[Any, ...]:
    size, stride, padding, ceil_mode = settings[7:]
    checks.check_batch_norm(_NAME, input, *settings[:7])
    checks.check_image(_NAME, input)
    window = max_pool.pool_window(_NAME, "pool_", size, stride, padding, 1, ceil_mode)
    max_pool.check_window(_NAME, window, "pool_", *input.shape[-3:])
    return input, window, *settings[:4]


def _refuse(input: Tensor, window: Window, *parameters: Tensor | None) -> str:
    if input.dim() == 3:  # to batch norm it is (N, C, L), to max-pool (C, H, W)
        return "takes argument 'input' as (N, C, H, W), got three axes"
    return bn_relu.refuse(input, *parameters) or max_pool.refuse(input, window, "pool_size")
