"""Argument checks, made once before any kernel. Each raises torch's error class for the mistake, with more detail."""

from numbers import Real
from typing import Any

import torch
from torch import Tensor

from fastcnn.shapes import MAX_WINDOW_PLACES, Window, is_integer

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


def check_flag(function: str, name: str, value: object) -> None:
    """Raise a TypeError unless the argument is a bool."""
    if not isinstance(value, bool):
        raise wrong(function, name, "a bool", repr(value), TypeError)


def check_match(function: str, input: Tensor, **others: Tensor | None) -> None:
    """Check that parameters have the input's dtype and device."""
    for name, other in others.items():
        if other is None:
            continue
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
    (rows, columns), strides, (top, left), dilations, _ = window
    small = max(*strides, *dilations) <= MOST_PIXELS
    if small and channels > 0 and 2 * top <= rows and 2 * left <= columns and window.fits(height, width):
        return  # the usual case costs little
    size_name = "pool_size" if prefix else "kernel_size"
    if min(window.size) <= 0:
        raise wrong(function, size_name, "positive sizes", window.size)
    check_steps(function, window, prefix)
    names = size_name, prefix + "stride", prefix + "padding", prefix + "dilation"
    for name, pixels in zip(names, window[:4]):
        if max(pixels) > MOST_PIXELS:
            raise wrong(function, name, f"at most {MOST_PIXELS}", pixels)
    half = (rows // 2, columns // 2)
    if top > half[0] or left > half[1]:
        raise wrong(function, prefix + "padding", f"at most half of the window, {half}", window.padding)
    if channels == 0 or height == 0 or width == 0:
        raise wrong(function, "input", "at least one channel, row and column", f"{channels}x{height}x{width}")
    if min(window.output_size(height, width)) <= 0:
        expected = f"a window that fits into {height}x{width} pixels and their padding"
        raise wrong(function, size_name, expected, window.size)


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
