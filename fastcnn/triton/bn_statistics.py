"""Mean and variance of each channel in Triton: one pass by Welford's recurrence, then one that merges its rows.

Layout: NCHW or NHWC, one program some tiles of pixels and channels (see tiles.py). What is summed over many values is
summed in float64 at the end: a batch norm's error is then that of its elementwise arithmetic.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcnn.triton.tiles import Tiling, dense, indices, is_channels_last, is_wide, offset, tile_position, tiling

MOST_ROWS = 1024  # of partial sums: few enough to be merged quickly, enough for every GPU
MERGED_ROWS = 64  # of them that the merging kernel holds at once


@triton.jit
def channel_origin(x_ptr, c, C, P, CHANNELS_LAST: tl.constexpr):
    """Return the first pixel of each channel, from which sums start: a mean far from zero then costs no precision."""
    first = tl.load(x_ptr + offset(c, 0, C, P, CHANNELS_LAST), mask=c < C, other=0.0).to(tl.float32)
    return tl.where(tl.abs(first) < float("inf"), first, 0.0)


@triton.jit(do_not_specialize=["ROWS", "REPEAT"])
def statistics_kernel(
    x_ptr,
    partial_ptr,
    C,
    P,
    BLOCKS_P,
    BLOCKS_C,
    ROWS,
    REPEAT,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Leave mean and sum of squared deviations of REPEAT tiles of x: (N, C, P) in a row of partial: (2, ROWS, C).

    Each place of the tile has its own, by Welford's recurrence; they are merged at the end.
    """
    n, block_p, block_c = tile_position(BLOCKS_P, BLOCKS_C)
    c = indices(block_c, BLOCK_C, WIDE)
    origin = channel_origin(x_ptr, c, C, P, CHANNELS_LAST)
    x_ptr += n * C * P
    mean = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    squares = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    count = tl.zeros((BLOCK_P,), tl.float32)  # of pixels: the same for all channels
    for i in range(REPEAT):
        p = indices(block_p * REPEAT + i, BLOCK_P, WIDE)
        mask = (p < P)[:, None] & (c < C)[None, :]
        x = tl.load(x_ptr + offset(c[None, :], p[:, None], C, P, CHANNELS_LAST), mask=mask, other=0.0).to(tl.float32)
        off = tl.where(mask, x - origin[None, :] - mean, 0.0)
        count += tl.where(p < P, 1.0, 0.0)
        mean += off / tl.maximum(count, 1.0)[:, None]
        squares += tl.where(mask, off * (x - origin[None, :] - mean), 0.0)
    total = tl.maximum(tl.sum(count, axis=0), 1.0)
    merged = tl.sum((count[:, None] * mean).to(tl.float64), axis=0) / total
    off = mean - merged[None, :]
    squares = tl.sum(squares + count[:, None] * off * off, axis=0)
    at = partial_ptr + (n * BLOCKS_P + block_p) * C + c
    tl.store(at, merged, mask=c < C)
    tl.store(at + ROWS * C, squares, mask=c < C)


@triton.jit(do_not_specialize=["ROWS"])
def merge_kernel(
    x_ptr,
    partial_ptr,
    out_ptr,
    C,
    P,
    BLOCKS_P,
    ROWS,
    SPAN,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Merge partial: (2, ROWS, C) to mean, biased and unbiased variance: (3, C); a row covers SPAN pixels at most."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mean = tl.zeros((BLOCK_R, BLOCK_C), tl.float64)
    squares = tl.zeros((BLOCK_R, BLOCK_C), tl.float64)
    total = (ROWS // BLOCKS_P).to(tl.float64) * P
    for start in range(0, ROWS, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        mask = (row < ROWS)[:, None] & (c < C)[None, :]
        count = tl.minimum(P - row % BLOCKS_P * SPAN, SPAN).to(tl.float32)[:, None]
        at = partial_ptr + row[:, None].to(tl.int64) * C + c[None, :]
        mean += tl.load(at, mask=mask, other=0.0) * count
    merged = tl.sum(mean, axis=0) / total
    for start in range(0, ROWS, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        mask = (row < ROWS)[:, None] & (c < C)[None, :]
        count = tl.minimum(P - row % BLOCKS_P * SPAN, SPAN).to(tl.float32)[:, None]
        at = partial_ptr + row[:, None].to(tl.int64) * C + c[None, :]
        off = tl.load(at, mask=mask, other=0.0) - merged[None, :]
        squares += tl.where(mask, tl.load(at + ROWS.to(tl.int64) * C, mask=mask, other=0.0) + count * off * off, 0.0)
    scatter = tl.sum(squares, axis=0)
    origin = channel_origin(x_ptr, c, C, P, CHANNELS_LAST)
    tl.store(out_ptr + c, merged + origin, mask=c < C)
    tl.store(out_ptr + C + c, scatter / total, mask=c < C)
    tl.store(out_ptr + 2 * C + c, scatter / (total - 1.0), mask=c < C)


def planes(x: Tensor) -> tuple[int, int, int]:
    """Return images, channels and pixels of (N, C, *)."""
    return x.shape[0], x.shape[1], math.prod(x.shape[2:])


def summing(images: int, pixels: int, channels: int, channels_last: bool) -> tuple[Tiling, int]:
    """Return the tiles of a kernel that sums, and how many of them a program goes over."""
    single = tiling(pixels, channels, channels_last, elements=1024)
    repeat = max(triton.cdiv(single.blocks_p * images, MOST_ROWS), 1)
    return single._replace(blocks_p=triton.cdiv(single.blocks_p, repeat)), repeat


def bn_relu_statistics(input: Tensor) -> Tensor:
    """Operator ``fastcnn::bn_relu_statistics.triton``: mean, biased and unbiased variance, (3, C)."""
    x = dense(input)
    images, channels, pixels = planes(x)
    channels_last = is_channels_last(input)
    tiles, repeat = summing(images, pixels, channels, channels_last)
    rows = images * tiles.blocks_p
    partial = x.new_empty((2, rows, channels), dtype=torch.float64)
    out = x.new_empty((3, channels), dtype=torch.float32)
    if x.numel() == 0:
        return out.fill_(float("nan"))
    statistics_kernel[tiles.grid(images)](
        x, partial, channels, pixels, tiles.blocks_p, tiles.blocks_c, rows, repeat,
        CHANNELS_LAST=channels_last, WIDE=is_wide(x), BLOCK_P=tiles.block_p, BLOCK_C=tiles.block_c,
    )  # fmt: skip
    merge_kernel[(triton.cdiv(channels, 8),)](
        x, partial, out, channels, pixels, tiles.blocks_p, rows, repeat * tiles.block_p,
        CHANNELS_LAST=channels_last, BLOCK_R=MERGED_ROWS, BLOCK_C=8,
    )  # fmt: skip
    return out
