"""Convolution, bias and ReLU: the operators ``conv_relu`` and ``conv_relu_backward``, and autograd."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastcnn.ops import autograd, checks, convolution
from fastcnn.ops.convolution import Convolution, prepare, reference
from fastcnn.ops.gradients import Incoming, gradients, let_go, stage_before
from fastcnn.ops.record import CONVOLUTION, INPUT, Op, runner


def fake_backward(grad: Tensor, output: Tensor, bias_grad: bool) -> tuple[Tensor, Tensor]:
    """Return empty tensors like the masked gradient and the bias gradient (without elements if not asked for)."""
    return torch.empty_like(output), output.new_empty(output.shape[1] if bias_grad else 0)


def _refuse(input: Tensor, *_: Any) -> str:
    return checks.refuse_dtype(input)


def _prepare(*arguments: Any) -> tuple[Any, ...]:
    return prepare(OP.function, *arguments)


OP = Op(
    "conv_relu", "conv2d_relu", INPUT, CONVOLUTION, stock=reference, prepare=_prepare, refuse=_refuse, product="conv"
)
_forward = OP.forward(convolution.fake, convolution.flops)
_backward = OP.define(
    "conv_relu_backward",
    "(Tensor grad, Tensor output, bool bias_grad) -> (Tensor grad_conv, Tensor grad_bias)",
    fake_backward,
)


class ConvReLU(torch.autograd.Function):
    """(N, C, H, W) -> (N, C_out, OH, OW); saves input, weight and the output, whose sign is the ReLU mask."""

    @staticmethod
    def forward(input: Tensor, weight: Tensor, bias: Tensor | None, settings: Convolution, backend: str) -> Tensor:
        return _forward[backend](input, weight, bias, *settings.operands())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, weight, _, ctx.settings, ctx.backend = inputs
        ctx.before = stage_before(input, ctx.settings)
        ctx.masked, ctx.bias_sum = False, None  # the next stage sets them if its dgrad masks for this one
        ctx.save_for_backward(input, weight, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, output = ctx.saved_tensors
        needs = ctx.needs_input_grad
        if autograd.differentiable():
            let_go(ctx)
            grad_conv = autograd.relu_gradient(grad, output)
            grad_bias = grad_conv.sum((0, 2, 3)) if needs[2] else None
            return *convolution.gradients(grad_conv, input, weight, ctx.settings, needs), grad_bias, None, None
        incoming = Incoming(grad, bias=ctx.bias_sum) if ctx.masked else Incoming(grad, output)
        one_pass = partial(_backward[ctx.backend], grad, output)
        return *gradients(ctx, input, weight, incoming, one_pass), None, None


_run = runner(ConvReLU, _forward)
conv_relu = OP.by(lambda route, *prepared: convolution.run_batched(_run, route, *prepared))
