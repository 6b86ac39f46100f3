"""Convolution, bias and ReLU: the operators ``conv_relu`` and ``conv_relu_backward``, and autograd."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastcnn.ops import autograd, checks, convolution
from fastcnn.ops.convolution import prepare, reference
from fastcnn.ops.gradients import Incoming, gradients, stage_before, stock_gradients
from fastcnn.ops.record import CONVOLUTION, INPUT, Op


def fake_backward(grad: Tensor, output: Tensor, bias_grad: bool) -> tuple[Tensor, Tensor]:
    """Return empty tensors like the masked gradient and the bias gradient (without elements if not asked for)."""
    return torch.empty_like(output), output.new_empty(output.shape[1] if bias_grad else 0)


OP = Op(
    "conv_relu",
    "conv2d_relu",
    INPUT,
    CONVOLUTION,
    stock=reference,
    prepare=prepare,
    refuse=checks.refuse_dtype,
    product="conv",
)
OP.forward(convolution.fake, convolution.flops)
_backward = OP.define(
    "conv_relu_backward",
    "(Tensor grad, Tensor output, bool bias_grad) -> (Tensor grad_conv, Tensor grad_bias)",
    fake_backward,
)


def _saves(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> tuple[Tensor, ...]:
    input, weight, *_ = inputs
    ctx.before = stage_before(input, ctx.settings)
    ctx.masked, ctx.bias_sum = False, None  # the next stage sets them if its dgrad masks for this one
    return input, weight, output


@OP.differentiable("ConvReLU", "settings", saves=_saves)
def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """(N, C, H, W) -> (N, C_out, OH, OW); saves input, weight and the output, whose sign is the ReLU mask."""
    input, weight, output = ctx.saved_tensors
    if autograd.differentiable():
        return stock_gradients(ctx, autograd.relu_gradient(grad, output), input, weight)
    incoming = Incoming(grad, bias=ctx.bias_sum) if ctx.masked else Incoming(grad, output)
    return gradients(ctx, input, weight, incoming, partial(_backward[ctx.backend], grad, output))


OP.runs(partial(convolution.run_batched, OP.run))
