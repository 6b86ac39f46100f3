"""Mean and variance of each channel in Triton: one pass for sums from a place near the mean, then one that merges rows.

Layout: NCHW or NHWC, one program some tiles of pixels and channels (see tiles.py). What is summed over many values is
summed in float64 at the end: a batch norm's error is then that of its elementwise arithmetic.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcnn.triton.tiles import (
    ceil_div,
    first_tile,
    indices,
    is_wide,
    laid_out,
    next_tile,
    planes,
    tile_at,
    tiling,
    vector,
)

MERGED_ROWS = 64  # of them that the merging kernel holds at once


class Norm(NamedTuple):
    """A channel's numbers as kernels read them: mean, variance, weight and bias, (C,) each, where there are."""

    mean: Tensor | None = None
    variance: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: float = 0.0

    @classmethod
    def of(cls, mean: Tensor, variance: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> "Norm":
        """Return the numbers of an operator's arguments without gaps."""
        return cls(vector(mean), vector(variance), vector(weight), vector(bias), eps)


@triton.jit
def channel_numbers(norm, c, C, AXIS: tl.constexpr):
    """Return mean, 1 / standard deviation, weight and bias of channels c: [C], each with a further axis."""
    mask = c < C
    mean = tl.zeros(c.shape, tl.float32)
    inverse = tl.full(c.shape, 1.0, tl.float32)
    weight = tl.full(c.shape, 1.0, tl.float32)
    bias = tl.zeros(c.shape, tl.float32)
    if norm.mean is not None:
        mean = tl.load(norm.mean + c, mask=mask, other=0.0)
        inverse = tl.div_rn(1.0, tl.sqrt_rn(tl.load(norm.variance + c, mask=mask, other=1.0) + norm.eps))
    if norm.weight is not None:
        weight = tl.load(norm.weight + c, mask=mask, other=1.0)
    if norm.bias is not None:
        bias = tl.load(norm.bias + c, mask=mask, other=0.0).to(tl.float32)
    mean, inverse = tl.expand_dims(mean, AXIS), tl.expand_dims(inverse, AXIS)
    return mean, inverse, tl.expand_dims(weight, AXIS), tl.expand_dims(bias, AXIS)


@triton.jit
def normalized(x, numbers):
    """Return x in float32, shifted and scaled by `channel_numbers`."""
    mean, inverse, weight, bias = numbers
    return (x - mean) * (inverse * weight) + bias


@triton.jit(do_not_specialize=["TILES", "ROWS", "REPEAT"])
def statistics_kernel(x_ptr, partial_ptr, C, P, ROWS, TILES, BLOCKS_P, BLOCKS_C, REPEAT, TILE: tl.constexpr):
    """Write count, mean and sum of squared deviations of REPEAT tiles of x: (N, C, P) to partial: (3, ROWS, C).

    Sums start from the mean of the program's first tile: a mean far from zero then costs no precision.
    """
    row, image, block_p, block_c = first_tile(BLOCKS_P, BLOCKS_C, REPEAT)
    c = indices(block_c, TILE.channels, TILE.wide)
    _, mask, at = tile_at(image, block_p, c, C, P, TILE)
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    origin = tl.sum(x, axis=0) * (1.0 / tl.minimum(P - block_p * TILE.pixels, TILE.pixels).to(tl.float32))
    origin = tl.where(tl.abs(origin) < float("inf"), origin, 0.0).to(x_ptr.dtype.element_ty)  # near the mean will do
    sums = tl.full((TILE.pixels, TILE.channels), 0.0, tl.float32)
    squares = tl.full((TILE.pixels, TILE.channels), 0.0, tl.float32)
    count = tl.zeros((), tl.int32)
    for _ in range(tl.minimum(REPEAT, TILES - row * REPEAT)):
        _, mask, at = tile_at(image, block_p, c, C, P, TILE)
        off = tl.load(x_ptr + at, mask=mask, other=origin[None, :]).to(tl.float32) - origin.to(tl.float32)[None, :]
        sums += off
        squares += off * off
        count += tl.minimum(P - block_p * TILE.pixels, TILE.pixels)
        image, block_p = next_tile(image, block_p, BLOCKS_P)
    number = count.to(tl.float64)
    off = tl.sum(sums, axis=0).to(tl.float64) * (1.0 / number)
    squares = tl.sum(squares, axis=0).to(tl.float64) - number * off * off
    squares = tl.where(squares < 0.0, 0.0, squares)
    at = partial_ptr + row.to(tl.int64) * C + c
    tl.store(at, tl.zeros(c.shape, tl.float64) + number, mask=c < C)
    tl.store(at + ROWS * C, off + origin.to(tl.float64), mask=c < C)
    tl.store(at + 2 * ROWS * C, squares, mask=c < C)


@triton.jit
def partial_rows(partial_ptr, start, c, C, ROWS, BLOCK_R: tl.constexpr):
    """Return pointers to the first of several sums (ROWS, C), BLOCK_R rows of it from `start` on, and which exist."""
    row = start + tl.arange(0, BLOCK_R)
    mask = (row < ROWS)[:, None] & (c < C)[None, :]
    return partial_ptr + row[:, None].to(tl.int64) * C + c[None, :], mask


@triton.jit(do_not_specialize=["ROWS"])
def merge_kernel(partial_ptr, out_ptr, C, ROWS, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Merge partial: (3, ROWS, C) to mean, biased and unbiased variance: (3, C)."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mean = tl.zeros((BLOCK_R, BLOCK_C), tl.float64)
    total = tl.zeros((BLOCK_R, BLOCK_C), tl.float64)
    for start in range(0, ROWS, BLOCK_R):
        at, mask = partial_rows(partial_ptr, start, c, C, ROWS, BLOCK_R)
        count = tl.load(at, mask=mask, other=0.0)
        mean += tl.load(at + ROWS * C, mask=mask, other=0.0) * count
        total += count
    number = tl.sum(total, axis=0)
    merged = tl.sum(mean, axis=0) / number
    squares = tl.zeros((BLOCK_R, BLOCK_C), tl.float64)
    for start in range(0, ROWS, BLOCK_R):
        at, mask = partial_rows(partial_ptr, start, c, C, ROWS, BLOCK_R)
        count = tl.load(at, mask=mask, other=0.0)
        off = tl.load(at + ROWS * C, mask=mask, other=0.0) - merged[None, :]
        within = tl.load(at + 2 * ROWS * C, mask=mask, other=0.0)
        squares += tl.where(mask, within + count * off * off, 0.0)
    scatter = tl.sum(squares, axis=0)
    tl.store(out_ptr + c, merged, mask=c < C)
    tl.store(out_ptr + C + c, scatter / number, mask=c < C)
    tl.store(out_ptr + 2 * C + c, scatter / (number - 1.0), mask=c < C)


def bn_relu_statistics(input: Tensor) -> Tensor:
    """Operator ``fastcnn::bn_relu_statistics.triton``: mean, biased and unbiased variance, (3, C)."""
    x, _, channels_last = laid_out(input)
    _, channels, pixels = planes(x)
    out = x.new_empty((3, channels), dtype=torch.float32)
    if x.numel() == 0:
        return out.fill_(float("nan"))
    tiles = tiling(*planes(x), channels_last, is_wide(x), elements=2048)
    rows, grid, numbers = tiles.walk()
    partial = x.new_empty((3, rows, channels), dtype=torch.float64)
    statistics_kernel[grid](x, partial, channels, pixels, rows, *numbers, TILE=tiles.tile)
    merge_kernel[(ceil_div(channels, 8),)](partial, out, channels, rows, BLOCK_R=MERGED_ROWS, BLOCK_C=8)
    return out
