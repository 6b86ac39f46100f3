"""Normalization of images in Triton, in one pass: from bytes or floats to the network's dtype.

Layout: NCHW or NHWC, the output's as the input's. Offsets are int32 unless the whole tensor is WIDE.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcnn.triton.tiles import ceil_div, fits_int32, indices, laid_out

BLOCK = 1024


@triton.jit
def shift_and_scale(mean_ptr, std_ptr, channel, mask, BYTES: tl.constexpr):
    """Return what to subtract from a channel's values and what to multiply them by; bytes stand for 0 to 1."""
    mean = tl.load(mean_ptr + channel, mask=mask, other=0.0).to(tl.float32)
    std = tl.load(std_ptr + channel, mask=mask, other=1.0).to(tl.float32)
    if BYTES:
        mean *= 255.0
        std *= 255.0
    return mean, 1.0 / std


@triton.jit
def normalize_kernel(
    x_ptr, mean_ptr, std_ptr, y_ptr, ELEMENTS, C, P,
    CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Normalize x: (N, C, P) to y, element by element in memory order; one program does BLOCK of them."""
    at = indices(tl.program_id(0), BLOCK, WIDE)
    mask = at < ELEMENTS
    channel = at % C if CHANNELS_LAST else at // P % C
    shift, scale = shift_and_scale(mean_ptr, std_ptr, channel, mask, x_ptr.dtype.element_ty == tl.uint8)
    x = tl.load(x_ptr + at, mask=mask, other=0).to(tl.float32)
    tl.store(y_ptr + at, ((x - shift) * scale).to(y_ptr.dtype.element_ty), mask=mask)


def per_channel(values: Tensor, channels: int) -> Tensor:
    """Return one constant a channel, without gaps, where one may stand for all."""
    return values.expand(channels).contiguous()


def normalize(input: Tensor, mean: Tensor, std: Tensor, dtype: torch.dtype) -> Tensor:
    """Operator ``fastcnn::normalize.triton``: (N, C, H, W) to the same shape and layout in another dtype."""
    x, _, channels_last = laid_out(input)
    y = torch.empty_like(x, dtype=dtype)
    channels, height, width = x.shape[1:]
    if y.numel() == 0:
        return y
    normalize_kernel[(ceil_div(x.numel(), BLOCK),)](
        x, per_channel(mean, channels), per_channel(std, channels), y, x.numel(), channels, height * width,
        CHANNELS_LAST=channels_last, WIDE=not fits_int32(x), BLOCK=BLOCK,
    )  # fmt: skip
    return y
