"""Normalization, convolution, ReLU and max-pool: ``normalize_conv_relu_pool``, its ``_codes``, and autograd."""

from typing import Any

import torch
from torch import Tensor

from fastcnn.ops import autograd, checks, convolution, max_pool
from fastcnn.ops.codes import unpool
from fastcnn.ops.conv_relu_pool import _backward
from fastcnn.ops.convolution import Convolution, output_shape
from fastcnn.ops.normalize_conv_relu import image_gradients, joined, of_images
from fastcnn.ops.record import CONVOLUTION, IMAGES, POOL, Op, runner
from fastcnn.shapes import Window

OP = Op(
    *("normalize_conv_relu_pool", "conv2d_relu_max_pool2d"),
    *(IMAGES, CONVOLUTION, POOL),
    backends=("triton",),
    product="conv",
)
_fake, _flops = of_images(convolution.fake), of_images(convolution.flops)
_values = OP.forward(_fake, _flops)
_codes = OP.codes(_fake, _flops)


class NormalizeConvReLUPool(torch.autograd.Function):
    """(N, C, H, W) -> pooled values and codes; saves images, weight and codes, and normalizes again later."""

    @staticmethod
    def forward(
        input: Tensor,
        mean: Tensor,
        std: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        settings: Convolution,
        window: Window,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        output, codes = _codes[backend](input, mean, std, weight, bias, *settings.operands(), window.numbers())
        return output, codes, autograd.anchor(output)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        input, mean, std, weight, _, ctx.settings, ctx.window, ctx.backend = inputs
        ctx.height, ctx.width = output_shape(input, weight, *ctx.settings.window())[2:]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(input, mean, std, weight, *output[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: None, grad_anchor: Tensor | None) -> tuple[Tensor | None, ...]:
        *images, weight, codes, anchor = ctx.saved_tensors
        grad = autograd.incoming(grad, grad_anchor, codes)
        if grad is None:
            return (None,) * 8
        needs = ctx.needs_input_grad
        if autograd.differentiable():
            grad_conv = unpool(grad, codes, ctx.window, ctx.height, ctx.width, anchor)
            grad_bias = grad_conv.sum((0, 2, 3)) if needs[4] else None
        else:
            grad_conv, grad_bias = _backward[ctx.backend](
                grad, codes, ctx.height, ctx.width, needs[4], ctx.window.numbers()
            )
        grad_input, grad_weight = image_gradients(grad_conv, images, weight, ctx.settings, ctx.backend, needs)
        return grad_input, None, None, grad_weight, grad_bias if needs[4] else None, None, None, None


_run = runner(NormalizeConvReLUPool, _values)


def normalize_conv_relu_pool(*arguments: Any) -> Tensor | None:
    """Run the whole stage in one kernel, or return None."""
    images, layer, pool = OP.split(arguments)
    call = joined(OP, images, layer, pool)
    if call is None:
        return None
    window = max_pool.window_over(OP.function, call.input, call.weight, call.settings, pool)
    if checks.refuse_window("pool_size", window):
        return None
    return autograd.with_batch(_run, *call[:-1], window, call.backend)
