"""Argument checks, made once before any kernel. Each raises torch's error class for the mistake, with more detail."""

import operator
from numbers import Number, Real
from typing import Any

import torch
from torch import Tensor

from fastcnn.shapes import LARGEST, MAX_WINDOW_PLACES, Window, is_integer

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MOST_PIXELS = 2**31 - 1  # of a pool's window, stride, padding or dilation: torch takes them as C's int


def wrong(function: str, name: str, expected: str, got: object, kind: type[Exception] = RuntimeError) -> Exception:
    """Return the error of a wrong argument."""
    return kind(f"{function}: argument {name!r}: expected {expected}, got {got}")


def check_tensor(function: str, name: str, value: object) -> None:
    """Raise a TypeError unless the argument is a tensor."""
    if not isinstance(value, Tensor):
        raise wrong(function, name, "a Tensor", type(value).__name__, TypeError)


def check_integer(function: str, name: str, value: object) -> None:
    """Raise a TypeError unless the argument is an integer."""
    if not is_integer(value):
        raise wrong(function, name, "an int", repr(value), TypeError)


def check_groups(function: str, groups: Any) -> None:
    """Raise a TypeError unless the number of groups is an integer, a ValueError unless it fits into 64 bits."""
    check_integer(function, "groups", groups)
    if abs(operator.index(groups)) > LARGEST:
        raise wrong(function, "groups", "a 64-bit integer", groups, ValueError)


def check_flag(function: str, name: str, value: object) -> None:
    """Raise a TypeError unless the argument is a bool."""
    if not isinstance(value, bool):
        raise wrong(function, name, "a bool", repr(value), TypeError)


def check_match(function: str, input: Tensor, **others: Tensor | None) -> None:
    """Check that parameters are tensors of the input's dtype and device."""
    for name, other in others.items():
        if other is None:
            continue
        check_tensor(function, name, other)
        if other.dtype != input.dtype:
            raise wrong(function, name, f"{input.dtype} as 'input' has", other.dtype)
        if other.device != input.device:
            raise wrong(function, name, f"a tensor on {input.device}, where 'input' is", other.device)


def check_image(function: str, input: Tensor) -> None:
    """Check the rank: (N, C, H, W) or, unbatched, (C, H, W)."""
    if input.dim() not in (3, 4):
        raise wrong(function, "input", "(N, C, H, W) or (C, H, W)", f"shape {tuple(input.shape)}")


def check_steps(function: str, window: Window, prefix: str) -> None:
    """Check stride, padding and dilation of a window; ``prefix`` completes the arguments' names."""
    if min(window.stride) <= 0:
        raise wrong(function, prefix + "stride", "positive strides", window.stride)
    if min(window.padding) < 0:
        raise wrong(function, prefix + "padding", "no negative padding", window.padding)
    if min(window.dilation) <= 0:
        raise wrong(function, prefix + "dilation", "positive dilations", window.dilation)


def check_window(function: str, window: Window, prefix: str, channels: int, height: int, width: int) -> None:
    """Check a pooling window against the image that it slides over; ``prefix`` completes the arguments' names."""
    size_name = "pool_size" if prefix else "kernel_size"
    if min(window.size) <= 0:
        raise wrong(function, size_name, "positive sizes", window.size)
    check_steps(function, window, prefix)
    steps = {"stride": window.stride, "padding": window.padding, "dilation": window.dilation}
    for name, pixels in {size_name: window.size, **{prefix + step: given for step, given in steps.items()}}.items():
        if max(pixels) > MOST_PIXELS:
            raise wrong(function, name, f"at most {MOST_PIXELS}", pixels)
    half = (window.size[0] // 2, window.size[1] // 2)
    if window.padding[0] > half[0] or window.padding[1] > half[1]:
        raise wrong(function, prefix + "padding", f"at most half of the window, {half}", window.padding)
    if channels == 0 or height == 0 or width == 0:
        raise wrong(function, "input", "at least one channel, row and column", f"{channels}x{height}x{width}")
    if min(window.output_size(height, width)) <= 0:
        expected = f"a window that fits into {height}x{width} pixels and their padding"
        raise wrong(function, size_name, expected, window.size)


def check_conv(function: str, input: Tensor, weight: Tensor, bias: Tensor | None, window: Window, groups: int) -> None:
    """Check a convolution's arguments against each other."""
    check_match(function, input, weight=weight, bias=bias)
    check_image(function, input)
    check_steps(function, window, "")
    if weight.dim() != 4 or 0 in (weight.shape[0], weight.shape[2], weight.shape[3]):
        raise wrong(
            function, "weight", "(C_out, C_in / groups, KH, KW) with no size of 0", f"shape {tuple(weight.shape)}"
        )
    if groups <= 0:
        raise wrong(function, "groups", "a positive number", groups)
    out_channels, wanted = weight.shape[0], weight.shape[1] * groups
    if input.shape[-3] != wanted:
        got = f"{input.shape[-3]} (shape {tuple(input.shape)})"
        raise wrong(function, "input", f"{wanted} channels, weight.shape[1] * groups", got)
    if out_channels % groups:
        raise wrong(function, "weight", f"output channels divisible by {groups} groups", out_channels)
    if bias is not None and bias.shape != (out_channels,):
        raise wrong(function, "bias", f"shape ({out_channels},)", tuple(bias.shape))
    height, width = input.shape[-2:]
    if min(window.output_size(height, width)) <= 0:
        padded = (height + 2 * window.padding[0], width + 2 * window.padding[1])
        raise wrong(function, "weight", f"a kernel that fits into the padded input, {padded}", window.size)
    if height == 0 or width == 0:
        raise wrong(function, "input", "at least one row and column", f"{height}x{width}")


def check_linear(function: str, input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Check a linear layer's arguments against each other."""
    check_match(function, input, weight=weight, bias=bias)
    if weight.dim() not in (1, 2):
        raise wrong(function, "weight", "(out_features, in_features)", f"shape {tuple(weight.shape)}")
    if weight.dim() == 1 and bias is not None:
        raise wrong(function, "bias", "None with a weight of one axis", f"shape {tuple(bias.shape)}")
    if input.dim() == 0 or input.shape[-1] != weight.shape[-1]:
        got = f"shape {tuple(input.shape)}"
        raise wrong(function, "input", f"{weight.shape[-1]} features in the last axis", got)
    if bias is None:
        return
    output = (*input.shape[:-1], weight.shape[0])
    fits = bias.dim() <= max(2, len(output)) and all(b in (1, o) for b, o in zip(bias.shape[::-1], output[::-1]))
    if not fits:
        raise wrong(function, "bias", f"shape ({weight.shape[0]},)", tuple(bias.shape))


def check_lrn(function: str, input: Tensor, size: int, alpha: float, beta: float, k: float) -> None:
    """Check an LRN's input, (N, C, *), window size and constants."""
    check_tensor(function, "input", input)
    if input.dim() < 3:
        raise wrong(function, "input", "(N, C, *), three or more axes", f"shape {tuple(input.shape)}", ValueError)
    check_integer(function, "size", size)
    if size <= 0:
        raise wrong(function, "size", "a positive number of channels", size)
    if size > LARGEST:
        raise wrong(function, "size", f"at most {LARGEST} channels", size)
    for name, value in (("alpha", alpha), ("beta", beta), ("k", k)):
        if not isinstance(value, (Number, Tensor)):
            raise wrong(function, name, "a number", repr(value), TypeError)


def refuse_dtype(input: Tensor, *_: Any) -> str:
    """Say why no kernel takes this dtype or layout, or return an empty string."""
    if input.dtype not in KERNEL_DTYPES:
        return f"takes argument 'input' in float32, float16 or bfloat16, got {input.dtype}"
    return "" if input.layout is torch.strided else f"takes argument 'input' as a strided tensor, got {input.layout}"


def refuse_window(name: str, window: Window) -> str:
    """Say why no kernel takes this pooling window, or return an empty string."""
    if window.size[0] * window.size[1] <= MAX_WINDOW_PLACES:
        return ""
    return f"takes windows of up to {MAX_WINDOW_PLACES} places (one-byte codes), got argument {name!r} = {window.size}"


def refuse_constants(**constants: Any) -> str:
    """Say why no kernel takes these constants (tensors, which torch gives gradients; complex), or return ""."""
    for name, value in constants.items():
        if isinstance(value, Tensor) or not isinstance(value, Real):
            return f"takes argument {name!r} as a real number, got {value!r}"
    return ""


def check_batch_norm(
    function: str,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> None:
    """Check a batch norm's input, (N, C, *), the tensors (C,) of its channels, and its settings."""
    check_tensor(function, "input", input)
    if input.dim() < 2:
        raise wrong(function, "input", "(N, C, *), two or more axes", f"shape {tuple(input.shape)}")
    channels = input.shape[1]
    named = {"running_mean": running_mean, "running_var": running_var, "weight": weight, "bias": bias}
    for name, each in named.items():
        if each is None:
            continue
        check_tensor(function, name, each)
        if each.numel() != channels:
            raise wrong(function, name, f"shape ({channels},)", tuple(each.shape))
        if each.device != input.device:
            raise wrong(function, name, f"a tensor on {input.device}, where 'input' is", each.device)
    check_flag(function, "training", training)
    for name, value in (("momentum", momentum), ("eps", eps)):
        if not isinstance(value, Real):
            raise wrong(function, name, "a number", repr(value), TypeError)
    if (running_mean is None) != (running_var is None):
        missing = "running_mean" if running_mean is None else "running_var"
        raise wrong(function, missing, "both running statistics or neither", None, ValueError)
    if running_mean is None and not training:
        raise wrong(function, "running_mean", "a Tensor unless training is True", None)
    if eps < 0 or (training and eps == 0):
        raise wrong(function, "eps", "a positive number", eps, ValueError)
    if training and input.numel() == channels:
        got = f"shape {tuple(input.shape)}"
        raise wrong(function, "input", "more than one value a channel in training", got, ValueError)
