"""Max-pool: the reference, the operators ``max_pool``, ``max_pool_codes``, ``max_pool_backward``, and autograd."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastcnn.ops import autograd, checks, stock
from fastcnn.ops.convolution import output_shape
from fastcnn.ops.record import CONVOLUTION, INPUT, POOL, WINDOW, Op
from fastcnn.ops.stock import max_pool as reference
from fastcnn.parameters import RECORDS
from fastcnn.shapes import Size, Window, memory_format, pair


def fake(input: Tensor, *others: Any) -> Tensor:
    """Return an empty tensor with the shape and strides of the pooled output; the window comes last."""
    return _empty(input, *others[-1].output_size(input.shape[2], input.shape[3]))


def unpooled(grad: Tensor, codes: Tensor, height: int, width: int, *_: Any) -> Tensor:
    """Return an empty tensor like the gradient of what was pooled."""
    return _empty(codes, height, width, grad.dtype)


def _empty(input: Tensor, height: int, width: int, dtype: torch.dtype | None = None) -> Tensor:
    """Return an empty tensor like an input of another size."""
    shape = (*input.shape[:2], height, width)
    format = memory_format(input)
    return torch.empty(shape, dtype=dtype or input.dtype, device=input.device, memory_format=format)


def _prepare(
    function: str,
    input: Tensor,
    size: Size,
    stride: Size | None,
    padding: Size,
    dilation: Size,
    ceil_mode: bool,
    _return_indices: bool,
) -> tuple[Tensor, Window]:
    checks.check_tensor(function, "input", input)
    checks.check_image(function, input)
    return input, window_over(function, input.shape[-3:], size, stride, padding, ceil_mode, dilation, prefix="")


def _refuse(input: Tensor, window: Window) -> str:
    return checks.refuse_dtype(input) or checks.refuse_window("kernel_size", window)


OP = Op(
    "max_pool",
    "max_pool2d",
    INPUT,
    WINDOW,
    stock=reference,
    prepare=_prepare,
    refuse=_refuse,
    # Indices are made of the codes, which costs more than the pool.
    measured=lambda *arguments: "max_pool_indices" if arguments[-1] else "max_pool",
)
OP.forward(fake)
_backward = OP.define(
    "max_pool_backward",
    f"(Tensor grad, Tensor codes, SymInt height, SymInt width, {WINDOW.schema}) -> Tensor",
    unpooled,
)


def _saves(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    ctx.height, ctx.width = inputs[0].shape[2:]
    return output[1:]


@OP.differentiable("MaxPool", "window", saves=_saves, anchored=True)
def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor]:
    """(N, C, H, W) -> pooled values, their codes, an anchor; saves only the codes and the anchor, which is empty."""
    codes, anchor = ctx.saved_tensors
    if autograd.differentiable():
        return (stock.unpool(grad, codes, ctx.window, ctx.height, ctx.width, anchor),)
    return (_backward[ctx.backend](grad, codes, ctx.height, ctx.width, ctx.window.numbers()),)


def _max_pool(*arguments: Any) -> Any:
    route, prepared = OP.route(arguments)
    if route.backend == "torch":
        return OP.stock(*arguments)
    return autograd.with_batch(_run_with_indices if arguments[-1] else OP.run, *prepared, route.backend)


def _run_with_indices(input: Tensor, window: Window, backend: str) -> tuple[Tensor, Tensor]:
    output, codes, _ = OP.apply(input, window, backend)
    return output, stock.codes_to_indices(codes, window, input.shape[-1])


OP.runs_by(_max_pool)


def window_over(
    function: str,
    plane: Sequence[int],
    size: Size,
    stride: Size | None,
    padding: Size,
    ceil_mode: bool,
    dilation: Size = 1,
    prefix: str = "pool_",
) -> Window:
    """Return a pool's window, checked against what it slides over, (C, H, W); `prefix` completes arguments' names."""
    checks.check_flag(function, prefix + "ceil_mode", ceil_mode)
    sizes = pair(function, prefix + "size" if prefix else "kernel_size", size)
    window = Window(
        sizes,
        sizes if stride is None or stride in ((), []) else pair(function, prefix + "stride", stride),
        pair(function, prefix + "padding", padding),
        pair(function, prefix + "dilation", dilation),
        ceil_mode,
    )
    checks.check_window(function, window, prefix, *plane)
    return window


def after(before: Op, stem: str, function: str) -> Op:
    """Return the record of an op that pools what another one returns."""
    count, convolves = len(POOL.parameters), CONVOLUTION in before.groups

    def reference_after(*arguments: Any) -> Any:
        *others, size, stride, padding, ceil_mode = arguments
        return reference(before.run_stock(*others), size, stride, padding, 1, ceil_mode)

    def prepare(function: str, *arguments: Any) -> tuple[Any, ...]:
        input, *others = before.checks(function, *arguments[:-count])
        checks.check_image(function, input)
        plane: Sequence[int] = input.shape[-3:]
        if convolves:
            weight, _, settings = others
            plane = output_shape(input, weight, settings.window(weight))
        return input, *others, window_over(function, plane, *arguments[-count:])

    def refuse(input: Tensor, *others: Any) -> str:
        if reason := before.refuse(input, *others[:-1]):
            return reason
        if input.dim() == 3 and not convolves:  # to a normalization it is (N, C, L), to max-pool (C, H, W)
            return "takes argument 'input' as (N, C, H, W), got three axes"
        return checks.refuse_window("pool_size", others[-1])

    return Op(
        stem,
        function,
        *before.groups,
        POOL,
        stock=reference_after,
        prepare=prepare,
        refuse=refuse,
        product=RECORDS[before.stem].product,
        takes_empty=before.takes_empty,
    )
