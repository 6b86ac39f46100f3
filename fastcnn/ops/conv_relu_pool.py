"""Convolution, bias, ReLU and max-pool: ``conv_relu_pool``, ``conv_relu_pool_codes``, their backward, and autograd."""

from functools import partial
from typing import Any

from torch import Tensor

from fastcnn.ops import autograd, conv_relu, convolution, max_pool, stock
from fastcnn.ops.convolution import output_shape
from fastcnn.ops.gradients import Incoming, gradients, stage_before, stock_gradients
from fastcnn.ops.record import POOL

OP = max_pool.after(conv_relu.OP, "conv_relu_pool", "conv2d_relu_max_pool2d")
OP.forward(convolution.fake, convolution.flops)
_backward = OP.define(
    "conv_relu_pool_backward",
    f"(Tensor grad, Tensor codes, SymInt height, SymInt width, bool bias_grad, {POOL.schema}) "
    "-> (Tensor grad_conv, Tensor grad_bias)",
    lambda grad, codes, height, width, sums, _: (
        max_pool.unpooled(grad, codes, height, width),
        grad.new_empty(codes.shape[1] if sums else 0),
    ),
)


def _saves(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    input, weight, *_ = inputs
    ctx.before = stage_before(input, ctx.settings)
    return input, weight, *output[1:]


@OP.differentiable("ConvReLUPool", "settings", "window", saves=_saves, anchored=True)
def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """(N, C, H, W) -> pooled values, codes, an anchor; saves input, weight and codes, no values before the pool."""
    input, weight, codes, anchor = ctx.saved_tensors
    _, height, width = output_shape(input, weight, ctx.settings.window(weight))
    if autograd.differentiable():
        return stock_gradients(ctx, stock.unpool(grad, codes, ctx.window, height, width, anchor), input, weight)
    pool = ctx.window.numbers()

    def one_pass(bias_grad: bool) -> tuple[Tensor, Tensor]:
        return _backward[ctx.backend](grad, codes, height, width, bias_grad, pool)

    return gradients(ctx, input, weight, Incoming(grad, codes, pool), one_pass)


OP.runs(partial(convolution.run_batched, OP.run))
