"""Max-pool: the reference, the operators ``max_pool``, ``max_pool_codes``, ``max_pool_backward``, and autograd."""

from typing import Any

import torch
from torch import Tensor

from fastcnn.ops import autograd, checks
from fastcnn.ops.codes import codes_to_indices, unpool
from fastcnn.ops.convolution import Convolution, output_shape
from fastcnn.ops.record import INPUT, WINDOW, Op, runner
from fastcnn.ops.stock import max_pool as reference
from fastcnn.shapes import Size, Window, memory_format, pair


def fake(input: Tensor, window: Window) -> Tensor:
    """Return an empty tensor with the shape and strides of the pooled output."""
    size = window.output_size(input.shape[2], input.shape[3])
    return torch.empty(
        (*input.shape[:2], *size), dtype=input.dtype, device=input.device, memory_format=memory_format(input)
    )


def _fake_backward(grad: Tensor, codes: Tensor, height: int, width: int, _: Window) -> Tensor:
    shape = (*codes.shape[:2], height, width)
    return torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=memory_format(codes))


def _prepare(
    input: Tensor,
    kernel_size: Size,
    stride: Size | None,
    padding: Size,
    dilation: Size,
    ceil_mode: bool,
    return_indices: bool,
) -> tuple[Tensor, Window]:
    checks.check_tensor(OP.function, "input", input)
    checks.check_image(OP.function, input)
    window = pool_window(OP.function, "", kernel_size, stride, padding, ceil_mode, dilation)
    check_window(OP.function, window, "", *input.shape[-3:])
    return input, window


def _refuse(input: Tensor, window: Window) -> str:
    return refuse(input, window, "kernel_size")


def refuse(input: Tensor, window: Window, name: str) -> str:
    """Say why no kernel pools this input over this window, or return an empty string."""
    return checks.refuse_dtype(input) or checks.refuse_window(name, window)


OP = Op("max_pool", "max_pool2d", INPUT, WINDOW, stock=reference, prepare=_prepare, refuse=_refuse)
_values = OP.forward(fake)
_codes = OP.codes(fake)
_backward = OP.define(
    "max_pool_backward",
    f"(Tensor grad, Tensor codes, SymInt height, SymInt width, {WINDOW.schema}) -> Tensor",
    _fake_backward,
)


class MaxPool(torch.autograd.Function):
    """(N, C, H, W) -> pooled values, their codes, an anchor; saves only the codes and the anchor, which is empty."""

    @staticmethod
    def forward(input: Tensor, window: Window, backend: str) -> tuple[Tensor, Tensor, Tensor]:
        output, codes = _codes[backend](input, window.numbers())
        return output, codes, autograd.anchor(output)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        input, ctx.window, ctx.backend = inputs
        ctx.height, ctx.width = input.shape[2:]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*output[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: None, grad_anchor: Tensor | None) -> tuple[Tensor | None, ...]:
        codes, anchor = ctx.saved_tensors
        grad = autograd.incoming(grad, grad_anchor, codes)
        if grad is None:
            return None, None, None
        if autograd.differentiable():
            return unpool(grad, codes, ctx.window, ctx.height, ctx.width, anchor), None, None
        return _backward[ctx.backend](grad, codes, ctx.height, ctx.width, ctx.window.numbers()), None, None


_apply = autograd.applier(MaxPool)
_run = runner(MaxPool, _values)


def max_pool(*arguments: Any) -> Any:
    """Run ``fastcnn.functional.max_pool2d``."""
    route, prepared = OP.route(arguments)
    if route.backend == "torch":
        return OP.stock(*arguments)
    return autograd.with_batch(_run_with_indices if arguments[-1] else _run, *prepared, route.backend)


def _run_with_indices(input: Tensor, window: Window, backend: str) -> tuple[Tensor, Tensor]:
    output, codes, _ = _apply(input, window, backend)
    return output, codes_to_indices(codes, window, input.shape[-1])


def pool_window(
    function: str, prefix: str, size: Size, stride: Size | None, padding: Size, ceil_mode: bool, dilation: Size = 1
) -> Window:
    """Return a pool's window; ``prefix`` completes the arguments' names."""
    checks.check_flag(function, prefix + "ceil_mode", ceil_mode)
    sizes = pair(function, prefix + "size" if prefix else "kernel_size", size)
    return Window(
        sizes,
        sizes if stride is None or stride in ((), []) else pair(function, prefix + "stride", stride),
        pair(function, prefix + "padding", padding),
        pair(function, prefix + "dilation", dilation),
        ceil_mode,
    )


def check_window(function: str, window: Window, prefix: str, channels: int, height: int, width: int) -> None:
    """Check a pool's window against the image, fast; if it does not fit, checks.check_window raises the error."""
    (rows, columns), strides, (top, left), dilations, _ = window
    small = max(*strides, *dilations) <= checks.MOST_PIXELS
    if not (small and channels > 0 and 2 * top <= rows and 2 * left <= columns and window.fits(height, width)):
        checks.check_window(function, window, prefix, channels, height, width)


def window_over(function: str, input: Tensor, weight: Tensor, settings: Convolution, pool: tuple[Any, ...]) -> Window:
    """Return the window of a pool over a convolution's output, checked against it."""
    window = pool_window(function, "pool_", *pool)
    images = input if input.dim() == 4 else input[None]
    check_window(function, window, "pool_", *output_shape(images, weight, *settings.window())[1:])
    return window
