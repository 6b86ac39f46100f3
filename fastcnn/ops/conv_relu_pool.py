"""Convolution, bias, ReLU and max-pool: ``conv_relu_pool``, ``conv_relu_pool_codes``, their backward, and autograd."""

from typing import Any

import torch
from torch import Tensor

from fastcnn.ops import autograd, convolution, max_pool, stock
from fastcnn.ops.codes import unpool
from fastcnn.ops.convolution import Convolution, output_shape, prepare
from fastcnn.ops.gradients import Incoming, gradients, let_go, stage_before
from fastcnn.ops.max_pool import refuse
from fastcnn.ops.record import CONVOLUTION, INPUT, POOL, Op, runner
from fastcnn.shapes import Window, memory_format


def reference(*arguments: Any) -> Tensor:
    """Return conv2d, ReLU and max-pool as torch runs them."""
    (input,), layer, pool = OP.split(arguments)
    return stock.pool(convolution.reference(input, *layer), *pool)


def _fake_backward(
    grad: Tensor, codes: Tensor, height: int, width: int, bias_grad: bool, _: Window
) -> tuple[Tensor, Tensor]:
    images, channels = codes.shape[:2]
    grad_conv = torch.empty(
        (images, channels, height, width), dtype=grad.dtype, device=grad.device, memory_format=memory_format(codes)
    )
    return grad_conv, grad.new_empty(channels if bias_grad else 0)


def _prepare(*arguments: Any) -> tuple[Tensor, Tensor, Tensor | None, Convolution, Window]:
    (input,), layer, pool = OP.split(arguments)
    input, weight, bias, settings = prepare(OP.function, input, *layer)
    return input, weight, bias, settings, max_pool.window_over(OP.function, input, weight, settings, pool)


def _refuse(input: Tensor, weight: Tensor, bias: Tensor | None, settings: Convolution, window: Window) -> str:
    return refuse(input, window, "pool_size")


OP = Op(
    *("conv_relu_pool", "conv2d_relu_max_pool2d"),
    *(INPUT, CONVOLUTION, POOL),
    stock=reference,
    prepare=_prepare,
    refuse=_refuse,
    product="conv",
)
_values = OP.forward(convolution.fake, convolution.flops)
_codes = OP.codes(convolution.fake, convolution.flops)
_backward = OP.define(
    "conv_relu_pool_backward",
    f"(Tensor grad, Tensor codes, SymInt height, SymInt width, bool bias_grad, {POOL.schema}) "
    "-> (Tensor grad_conv, Tensor grad_bias)",
    _fake_backward,
)


class ConvReLUPool(torch.autograd.Function):
    """(N, C, H, W) -> pooled values, codes, an anchor; saves input, weight and codes, no values before the pool."""

    @staticmethod
    def forward(
        input: Tensor, weight: Tensor, bias: Tensor | None, settings: Convolution, window: Window, backend: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        output, codes = _codes[backend](input, weight, bias, *settings.operands(), window.numbers())
        return output, codes, autograd.anchor(output)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        input, weight, _, ctx.settings, ctx.window, ctx.backend = inputs
        ctx.height, ctx.width = output_shape(input, weight, *ctx.settings.window())[2:]
        ctx.before = stage_before(input, ctx.settings)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(input, weight, *output[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: None, grad_anchor: Tensor | None) -> tuple[Tensor | None, ...]:
        input, weight, codes, anchor = ctx.saved_tensors
        grad = autograd.incoming(grad, grad_anchor, codes)
        if grad is None:
            return (None,) * 6
        needs = ctx.needs_input_grad
        if autograd.differentiable():
            let_go(ctx)
            grad_conv = unpool(grad, codes, ctx.window, ctx.height, ctx.width, anchor)
            grad_bias = grad_conv.sum((0, 2, 3)) if needs[2] else None
            return *convolution.gradients(grad_conv, input, weight, ctx.settings, needs), grad_bias, None, None, None
        pool = ctx.window.numbers()

        def one_pass(bias_grad: bool) -> tuple[Tensor, Tensor]:
            return _backward[ctx.backend](grad, codes, ctx.height, ctx.width, bias_grad, pool)

        return *gradients(ctx, input, weight, Incoming(grad, codes, pool), one_pass), None, None, None


_run = runner(ConvReLUPool, _values)
conv_relu_pool = OP.by(lambda route, *prepared: convolution.run_batched(_run, route, *prepared))
