"""Argument checks, made once before any kernel. Each raises what torch raises for the same mistake, and says more."""

import torch
from torch import Tensor

from fastcnn.shapes import MAX_WINDOW_PLACES, Window

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def require(holds: bool, function: str, name: str, expected: str, got: object) -> None:
    """Raise a RuntimeError naming argument, expected and got, unless the condition holds."""
    if not holds:
        raise RuntimeError(f"{function}: argument {name!r}: expected {expected}, got {got}")


def check_tensor(function: str, name: str, value: object) -> None:
    """Raise a TypeError unless the argument is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{function}: argument {name!r}: expected a Tensor, got {type(value).__name__}")


def check_match(function: str, input: Tensor, **others: Tensor | None) -> None:
    """Check that parameters are tensors of the input's dtype and device."""
    check_tensor(function, "input", input)
    for name, other in others.items():
        if other is None:
            continue
        check_tensor(function, name, other)
        require(other.dtype == input.dtype, function, name, f"{input.dtype} as 'input' has", other.dtype)
        require(
            other.device == input.device, function, name, f"a tensor on {input.device}, where 'input' is", other.device
        )


def check_image(function: str, input: Tensor) -> None:
    """Check the rank: (N, C, H, W) or, unbatched, (C, H, W)."""
    require(input.dim() in (3, 4), function, "input", "(N, C, H, W) or (C, H, W)", f"shape {tuple(input.shape)}")


def check_window(function: str, window: Window, prefix: str, channels: int, height: int, width: int) -> None:
    """Check a pooling window against the image that it slides over; ``prefix`` completes the arguments' names."""
    size, stride, padding, dilation, _ = window
    size_name = "pool_size" if prefix else "kernel_size"
    require(min(size) > 0, function, size_name, "positive sizes", size)
    require(min(stride) > 0, function, prefix + "stride", "positive strides", stride)
    require(min(padding) >= 0, function, prefix + "padding", "no negative padding", padding)
    require(min(dilation) > 0, function, prefix + "dilation", "positive dilations", dilation)
    half = (window.span(0) // 2, window.span(1) // 2)
    fits = padding[0] <= half[0] and padding[1] <= half[1]
    require(fits, function, prefix + "padding", f"at most half of the window, {half}", padding)
    filled = channels > 0 and height > 0 and width > 0
    require(filled, function, "input", "at least one channel, row and column", f"{channels}x{height}x{width}")
    enough = min(window.output_size(height, width)) > 0
    require(enough, function, size_name, f"a window that fits into {height}x{width} pixels and their padding", size)


def check_conv(function: str, input: Tensor, weight: Tensor, bias: Tensor | None, window: Window, groups: int) -> None:
    """Check a convolution's arguments against each other."""
    check_match(function, input, weight=weight, bias=bias)
    check_image(function, input)
    require(weight.dim() == 4, function, "weight", "(C_out, C_in / groups, KH, KW)", f"shape {tuple(weight.shape)}")
    require(min(window.stride) > 0, function, "stride", "positive strides", window.stride)
    require(min(window.padding) >= 0, function, "padding", "no negative padding", window.padding)
    require(min(window.dilation) > 0, function, "dilation", "positive dilations", window.dilation)
    require(groups > 0, function, "groups", "a positive number", groups)
    channels, out_channels = input.shape[-3], weight.shape[0]
    wanted = weight.shape[1] * groups
    found = f"{channels} channels (shape {tuple(input.shape)})"
    require(channels == wanted, function, "input", f"{wanted} channels, weight.shape[1] * groups", found)
    require(
        out_channels % groups == 0, function, "weight", f"output channels divisible by {groups} groups", out_channels
    )
    if bias is not None:
        require(bias.shape == (out_channels,), function, "bias", f"shape ({out_channels},)", f"{tuple(bias.shape)}")
    enough = min(window.output_size(input.shape[-2], input.shape[-1])) > 0
    padded = tuple(input.shape[-2 + axis] + 2 * window.padding[axis] for axis in (0, 1))
    require(enough, function, "weight", f"a kernel that fits into the padded input, {padded}", f"{window.size}")


def check_linear(function: str, input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Check a linear layer's arguments against each other."""
    check_match(function, input, weight=weight, bias=bias)
    require(weight.dim() in (1, 2), function, "weight", "(out_features, in_features)", f"shape {tuple(weight.shape)}")
    features = weight.shape[-1]
    fits = input.dim() > 0 and input.shape[-1] == features
    require(fits, function, "input", f"{features} features in the last axis", f"shape {tuple(input.shape)}")
    if bias is not None:
        fits = tuple(bias.shape) in ((), (1,), tuple(weight.shape[:-1]))
        require(fits, function, "bias", f"shape {tuple(weight.shape[:-1])}", tuple(bias.shape))


def check_lrn(function: str, input: Tensor, size: int) -> None:
    """Check an LRN's input, (N, C, *), and window size."""
    check_tensor(function, "input", input)
    if input.dim() < 3:
        raise ValueError(
            f"{function}: argument 'input': expected (N, C, *) with 3 or more axes, got shape {tuple(input.shape)}"
        )
    if isinstance(size, bool) or not hasattr(size, "__index__"):
        raise TypeError(f"{function}: argument 'size': expected an int, got {size!r}")
    require(size > 0, function, "size", "a positive number of channels", size)


def refuse_dtype(input: Tensor) -> str:
    """Say why no kernel takes this dtype, or return an empty string."""
    if input.dtype in KERNEL_DTYPES:
        return ""
    return f"takes argument 'input' in float32, float16 or bfloat16, got {input.dtype}"


def refuse_window(name: str, window: Window) -> str:
    """Say why no kernel takes this pooling window, or return an empty string."""
    places = window.size[0] * window.size[1]
    if places <= MAX_WINDOW_PLACES:
        return ""
    return f"takes windows of up to {MAX_WINDOW_PLACES} places (one-byte codes), got argument {name!r} = {window.size}"
