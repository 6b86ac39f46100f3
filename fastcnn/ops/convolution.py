"""Shared by the stages that begin with a convolution: arguments, padding, and the convolution's own gradients."""

import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcnn.ops import autograd, checks, stock
from fastcnn.route import Route
from fastcnn.shapes import LARGEST, Size, Window, conv_memory_format, pair

_convolution_backward = torch.ops.aten.convolution_backward.default


class Convolution(NamedTuple):
    """A convolution's settings, as its operators take them."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    algorithm: str | None = None  # the backend's own choice
    # None: torch computes the gradient; else our kernel, by this configuration ("": the kernel chooses one).
    dgrad: str | None = None
    wgrad: str | None = None

    def running(self, algorithm: str) -> "Convolution":
        """Return these settings with an algorithm, such as ``epilogue+dgrad+wgrad:64x64x32w4s3``."""
        forward, *gradients = algorithm.split("+")
        ours = {kind: config for kind, _, config in (each.partition(":") for each in gradients)}
        return self._replace(algorithm=forward, dgrad=ours.get("dgrad"), wgrad=ours.get("wgrad"))

    def window(self, weight: Tensor) -> Window:
        """Return the window of the convolution's kernel."""
        return Window.of((*weight.shape[2:], *self.stride, *self.padding, *self.dilation, 0))

    def operands(self) -> tuple[tuple[int, ...], str | None]:
        """Return an operator's arguments: stride, padding, dilation and groups in one row, and the algorithm."""
        return (*self.stride, *self.padding, *self.dilation, self.groups), self.algorithm


def run_batched(run: Callable[..., Any], route: Route, *prepared: Any) -> Tensor:
    """Run a prepared call by the route's algorithm, with a batch axis in front of an unbatched input."""
    if route.algorithm:
        prepared = tuple(each.running(route.algorithm) if isinstance(each, Convolution) else each for each in prepared)
    output: Tensor = autograd.with_batch(run, *prepared, route.backend)
    return output


def output_shape(input: Tensor, weight: Tensor, window: Window) -> tuple[int, int, int]:
    """Return (C_out, OH, OW)."""
    return weight.shape[0], *window.output_size(input.shape[-2], input.shape[-1])


def flops(input: Tensor, weight: Tensor, _: Tensor | None, window: Window, *__: Any) -> int:
    """Return the number of FLOPs of a convolution."""
    height, width = output_shape(input, weight, window)[1:]
    return int(2 * input.shape[0] * height * width * weight.numel())


def fake(input: Tensor, weight: Tensor, _: Tensor | None, window: Window, *others: Any) -> Tensor:
    """Return an empty tensor with the shape and strides of the stage's output; a pool's window comes last."""
    channels, height, width = output_shape(input, weight, window)
    if isinstance(others[-1], Window):
        height, width = others[-1].output_size(height, width)
    shape, format = (input.shape[0], channels, height, width), conv_memory_format(input, weight)
    return torch.empty(shape, dtype=weight.dtype, device=input.device, memory_format=format)


def prepare(
    function: str,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Size,
    padding: Size | str,
    dilation: Size,
    groups: int,
) -> tuple[Tensor, Tensor, Tensor | None, Convolution]:
    """Check a convolution's arguments and bring them to one form.

    Applies autocast, and turns padding='same' into symmetric padding, after padding the input itself with the one
    row or column more that an even kernel wants at the bottom and right.
    """
    input, weight, bias = autograd.autocast(function, input, weight, bias)
    checks.check_integer(function, "groups", groups)
    if abs(operator.index(groups)) > LARGEST:
        raise checks.wrong(function, "groups", "a 64-bit integer", groups, ValueError)
    symmetric = (0, 0) if isinstance(padding, str) else pair(function, "padding", padding)
    window = Window(
        (weight.shape[-2], weight.shape[-1]) if weight.dim() == 4 else (1, 1),
        pair(function, "stride", stride),
        symmetric,
        pair(function, "dilation", dilation),
        False,
    )
    if isinstance(padding, str):
        input, window = _named_padding(function, input, window, padding)
    _check(function, input, weight, bias, window, groups)
    return input, weight, bias, Convolution(window.stride, window.padding, window.dilation, groups)


def _check(function: str, input: Tensor, weight: Tensor, bias: Tensor | None, window: Window, groups: int) -> None:
    """Check a convolution's arguments against each other."""
    sizes, kernel, dtype, device = input.shape, weight.shape, input.dtype, input.device
    if (
        (len(sizes) in (3, 4) and len(kernel) == 4 and dtype == weight.dtype and device == weight.device)
        and (bias is None or (bias.shape == kernel[:1] and bias.dtype == dtype and bias.device == device))
        and (groups > 0 and kernel[0] > 0 and kernel[0] % groups == 0 and sizes[-3] == kernel[1] * groups)
        and window.fits(sizes[-2], sizes[-1])
    ):
        return  # the usual case costs little
    checks.check_match(function, input, weight=weight, bias=bias)
    checks.check_image(function, input)
    checks.check_steps(function, window, "")
    if weight.dim() != 4 or 0 in (weight.shape[0], weight.shape[2], weight.shape[3]):
        raise checks.wrong(
            function, "weight", "(C_out, C_in / groups, KH, KW) with no size of 0", f"shape {tuple(weight.shape)}"
        )
    if groups <= 0:
        raise checks.wrong(function, "groups", "a positive number", groups)
    out_channels, wanted = weight.shape[0], weight.shape[1] * groups
    if input.shape[-3] != wanted:
        got = f"{input.shape[-3]} (shape {tuple(input.shape)})"
        raise checks.wrong(function, "input", f"{wanted} channels, weight.shape[1] * groups", got)
    if out_channels % groups:
        raise checks.wrong(function, "weight", f"output channels divisible by {groups} groups", out_channels)
    if bias is not None and bias.shape != (out_channels,):
        raise checks.wrong(function, "bias", f"shape ({out_channels},)", tuple(bias.shape))
    height, width = input.shape[-2:]
    if min(window.output_size(height, width)) <= 0:
        padded = (height + 2 * window.padding[0], width + 2 * window.padding[1])
        raise checks.wrong(function, "weight", f"a kernel that fits into the padded input, {padded}", window.size)
    if height == 0 or width == 0:
        raise checks.wrong(function, "input", "at least one row and column", f"{height}x{width}")


def _named_padding(function: str, input: Tensor, window: Window, padding: str) -> tuple[Tensor, Window]:
    if padding not in ("same", "valid"):
        raise checks.wrong(function, "padding", "'same', 'valid' or sizes", repr(padding))
    if padding == "valid":
        return input, window
    checks.check_steps(function, window, "")
    if window.stride != (1, 1):
        raise checks.wrong(function, "stride", "1 with padding='same'", window.stride)
    rows, columns = window.span(0) - 1, window.span(1) - 1
    if rows % 2 or columns % 2:
        input = F.pad(input, (0, columns % 2, 0, rows % 2))
    return input, window._replace(padding=(rows // 2, columns // 2))


def reference(*arguments: Any) -> Tensor:
    """Return conv2d and ReLU as torch runs them."""
    return stock.relu(F.conv2d(*arguments))


def gradients(
    grad: Tensor, input: Tensor, weight: Tensor, settings: Convolution, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Return dgrad and wgrad of the bare convolution as torch computes them, each only if needed."""
    if not (needs[0] or needs[1]):
        return None, None
    grad_input, grad_weight, _ = _convolution_backward(
        *(grad, input, weight, None, settings.stride, settings.padding, settings.dilation),
        *(False, [0, 0], settings.groups, [needs[0], needs[1], False]),
    )
    return grad_input, grad_weight
