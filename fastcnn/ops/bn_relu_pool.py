"""Batch norm, ReLU and max-pool: ``bn_relu_pool``, ``bn_relu_pool_codes``, their backward, and autograd.

The statistics are those of ``bn_relu``; the normalized values are never written.
"""

from typing import Any

import torch
from torch import Tensor

from fastcnn.ops import autograd, bn_relu, checks, max_pool, stock
from fastcnn.ops.bn_relu import GRADIENTS, Norm
from fastcnn.ops.record import BATCH_NORM, INPUT, POOL, Op, operands
from fastcnn.shapes import Window


def reference(*arguments: Any) -> Tensor:
    """Return batch norm, ReLU and max-pool as torch runs them."""
    (input,), norm, pool = OP.split(arguments)
    return stock.pool(bn_relu.reference(input, *norm), *pool)


def _fake(input: Tensor, mean: Any, variance: Any, weight: Any, bias: Any, eps: float, window: Window) -> Tensor:
    return max_pool.fake(input, window)


def _fake_backward(grad: Tensor, codes: Tensor, input: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return bn_relu.fake_gradients(input)


def _prepare(*arguments: Any) -> tuple[Any, ...]:
    (input,), norm, pool = OP.split(arguments)
    checks.check_batch_norm(OP.function, input, *norm)
    checks.check_image(OP.function, input)
    window = max_pool.pool_window(OP.function, "pool_", *pool)
    max_pool.check_window(OP.function, window, "pool_", *input.shape[-3:])
    mean, variance, weight, bias, *_ = norm
    return input, window, mean, variance, weight, bias


def _refuse(input: Tensor, window: Window, *parameters: Tensor | None) -> str:
    if input.dim() == 3:  # to batch norm it is (N, C, L), to max-pool (C, H, W)
        return "takes argument 'input' as (N, C, H, W), got three axes"
    return bn_relu.refuse(input, *parameters) or max_pool.refuse(input, window, "pool_size")


OP = Op(
    *("bn_relu_pool", "batch_norm_relu_max_pool2d"),
    *(INPUT, BATCH_NORM, POOL),
    stock=reference,
    prepare=_prepare,
    refuse=_refuse,
)
_values = OP.forward(_fake)
_codes = OP.codes(_fake)
_backward = OP.define(
    "bn_relu_pool_backward",
    f"(Tensor grad, Tensor codes, {INPUT.schema}, {BATCH_NORM.schema}, bool training, {POOL.schema}) -> {GRADIENTS}",
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
    (input,), norm, _ = OP.split(arguments)
    route, prepared = OP.route(arguments)
    if route.backend == "torch" or input.numel() == 0:
        return OP.stock(*arguments)
    numbers, window = bn_relu.prepare(route.backend, input, *norm), prepared[1]
    if autograd.needs_grad(input, numbers.weight, numbers.bias):
        return _apply(input, *numbers, window, route.backend)[0]
    return _values[route.backend](*operands((input, numbers, window)))
