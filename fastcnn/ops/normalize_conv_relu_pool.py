"""Normalisation, convolution, ReLU and max-pool: ``normalize_conv_relu_pool``, its ``_codes``, and autograd."""

from typing import Any

import torch
from torch import Tensor

from fastcnn.ops import autograd, checks, max_pool, normalize
from fastcnn.ops.codes import unpool
from fastcnn.ops.conv_relu_pool import _backward, conv_relu_pool
from fastcnn.ops.convolution import Convolution, output_shape
from fastcnn.ops.library import define
from fastcnn.ops.max_pool import WINDOW, pool_window
from fastcnn.ops.normalize_conv_relu import NORMALIZED_CONVOLUTION, flops, image_gradients, joined
from fastcnn.shapes import Size, Window, conv_memory_format


def _fake(
    input: Tensor,
    mean: Tensor,
    std: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Size,
    padding: Size,
    dilation: Size,
    groups: int,
    algorithm: str | None,
    *window: Any,
) -> Tensor:
    images, channels, height, width = output_shape(input, weight, stride, padding, dilation)
    shape = (images, channels, *Window(*window).output_size(height, width))
    return torch.empty(shape, dtype=weight.dtype, device=input.device, memory_format=conv_memory_format(input, weight))


def _fake_codes(*args: Any) -> tuple[Tensor, Tensor]:
    output = _fake(*args)
    return output, torch.empty_like(output, dtype=torch.uint8)


_NAME = "conv2d_relu_max_pool2d"  # the function that users know, for messages
_STEM = "normalize_conv_relu_pool"
_values = define(
    _STEM, _STEM, f"({NORMALIZED_CONVOLUTION}, {WINDOW}) -> Tensor", _fake, backends=("triton",), flops=flops
)
_codes = define(
    _STEM,
    f"{_STEM}_codes",
    f"({NORMALIZED_CONVOLUTION}, {WINDOW}) -> (Tensor output, Tensor codes)",
    _fake_codes,
    backends=("triton",),
    flops=flops,
)


class NormalizeConvReLUPool(torch.autograd.Function):
    """(N, C, H, W) -> pooled values and codes; saves images, weight and codes, and normalises again later."""

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
        output, codes = _codes[backend](input, mean, std, weight, bias, *settings.arguments(), window.numbers())
        return output, codes, autograd.anchor(output)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        input, mean, std, weight, _, ctx.settings, ctx.window, ctx.backend = inputs
        ctx.height, ctx.width = output_shape(input, weight, *ctx.settings[:3])[2:]
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


_apply = autograd.applier(NormalizeConvReLUPool)


def normalize_conv_relu_pool(norm_arguments: tuple[Any, ...], *arguments: Any) -> Tensor | None:
    """Run `normalize` on the arguments of one and `conv_relu_pool` on the result and the others, or return None."""
    call = joined(_STEM, _NAME, norm_arguments, arguments)
    if call is None:
        return None
    size, stride, padding, ceil_mode = arguments[6:]
    window = pool_window(_NAME, "pool_", size, stride, padding, 1, ceil_mode)
    if checks.refuse_window("pool_size", window):
        return None
    _, channels, height, width = output_shape(
        call.input if call.input.dim() == 4 else call.input[None], call.weight, *call.settings[:3]
    )
    max_pool.check_window(_NAME, window, "pool_", channels, height, width)
    return autograd.with_batch(_run, *call[:-1], window, call.backend)


def stage(*arguments: Any) -> Tensor:
    """Run the whole stage: by one kernel, or normalisation and the rest one after another."""
    images, others = arguments[:4], arguments[4:]
    joined_output = normalize_conv_relu_pool(images, *others)
    return conv_relu_pool(normalize.normalize(*images), *others) if joined_output is None else joined_output


def _run(
    input: Tensor,
    mean: Tensor,
    std: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    settings: Convolution,
    window: Window,
    backend: str,
) -> Tensor:
    if autograd.needs_grad(input, weight, bias):
        return _apply(input, mean, std, weight, bias, settings, window, backend)[0]
    return _values[backend](input, mean, std, weight, bias, *settings.arguments(), window.numbers())
