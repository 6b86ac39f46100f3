"""Batch norm, ReLU and max-pool: ``bn_relu_pool``, ``bn_relu_pool_codes``, their backward, and autograd.

The statistics are those of ``bn_relu``; the normalized values are never written.
"""

from functools import partial
from typing import Any

from torch import Tensor

from fastcnn.ops import autograd, bn_relu, max_pool, stock
from fastcnn.ops.bn_relu import GRADIENTS
from fastcnn.ops.record import BATCH_NORM, INPUT, POOL

OP = max_pool.after(bn_relu.OP, "bn_relu_pool", "batch_norm_relu_max_pool2d")
OP.forward(max_pool.fake)
_backward = OP.define(
    "bn_relu_pool_backward",
    f"(Tensor grad, Tensor codes, {INPUT.schema}, {BATCH_NORM.schema}, bool training, {POOL.schema}) -> {GRADIENTS}",
    lambda grad, codes, input, *_: bn_relu.fake_gradients(input),
)


@OP.differentiable("BatchNormReLUPool", "mode", "window", saves=lambda ctx, inputs, output: (*inputs[:5], output[1]))
def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """(N, C, H, W) -> pooled values and codes; saves the input, the codes and the channels' numbers."""
    input, *tensors, codes = ctx.saved_tensors
    mode, window = ctx.mode, ctx.window
    if autograd.differentiable():
        output = stock.max_pool(bn_relu.stock_output(input, tensors, mode), *window)
        found = bn_relu.stock_gradients(output, grad, input, *tensors[2:])
    else:
        found = _backward[ctx.backend](grad, codes, input, *tensors, mode.eps, mode.training, window.numbers())
    return bn_relu.spread(found, tensors)


OP.runs(partial(bn_relu.launch, OP))
