"""Mean and variance of each channel in Triton: one pass for sums from a place near the mean, then one that merges rows.

Layout: NCHW or NHWC, one program some tiles of pixels and channels (see tiles.py). What is summed over many values is
summed in float64 at the end: a batch norm's error is then that of its elementwise arithmetic.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcnn.triton.tiles import (
    Tiling,
    ceil_div,
    first_tile,
    indices,
    is_wide,
    laid_out,
    next_tile,
    rows_of,
    tile_at,
    tiling,
    vector,
)

PROGRAMS = 1056  # of a kernel that sums: enough for every GPU, few enough rows to be merged quickly
MERGED_ROWS = 64  # of them that the merging kernel holds at once


class Norm(NamedTuple):
    """A channel's numbers as kernels read them: mean, variance, weight and bias, (C,) each, or None."""

    mean: Tensor | None
    variance: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    eps: float

    @classmethod
    def of(cls, mean: Tensor, variance: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> "Norm":
        """Return the numbers of an operator's arguments without gaps."""
        return cls(vector(mean), vector(variance), vector(weight), vector(bias), eps)

    @classmethod
    def of_bias(cls, bias: Tensor | None) -> "Norm":
        """Return what adds a bias alone."""
        return cls(None, None, None, vector(bias), 0.0)


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
    return (
        tl.expand_dims(mean, AXIS),
        tl.expand_dims(inverse, AXIS),
        tl.expand_dims(weight, AXIS),
        tl.expand_dims(bias, AXIS),
    )


@triton.jit
def normalized(x, numbers):
    """Return x in float32, shifted and scaled by `channel_numbers`."""
    mean, inverse, weight, bias = numbers
    return (x - mean) * (inverse * weight) + bias


@triton.jit(do_not_specialize=["TILES", "ROWS", "REPEAT"])
def statistics_kernel(x_ptr, partial_ptr, C, P, TILES, BLOCKS_P, BLOCKS_C, ROWS, REPEAT, TILE: tl.constexpr):
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


def planes(x: Tensor) -> tuple[int, int, int]:
    """Return images, channels and pixels of (N, C, *)."""
    return x.shape[0], x.shape[1], math.prod(x.shape[2:])


def summing(
    images: int, pixels: int, channels: int, channels_last: bool, wide: bool, elements: int = 1024
) -> tuple[Tiling, int, int]:
    """Return the tiles of a kernel that sums, how many rows they make, and how many of them a row is."""
    tiles = tiling(pixels, channels, channels_last, wide, elements)
    return tiles, *rows_of(tiles, images, tiles.blocks_p * images, PROGRAMS)


def bn_relu_statistics(input: Tensor) -> Tensor:
    """Operator ``fastcnn::bn_relu_statistics.triton``: mean, biased and unbiased variance, (3, C)."""
    x, _, channels_last = laid_out(input)
    images, channels, pixels = planes(x)
    out = x.new_empty((3, channels), dtype=torch.float32)
    if x.numel() == 0:
        return out.fill_(float("nan"))
    tiles, rows, repeat = summing(images, pixels, channels, channels_last, is_wide(x), elements=2048)
    partial = x.new_empty((3, rows, channels), dtype=torch.float64)
    statistics_kernel[(rows * tiles.blocks_c,)](
        x, partial, channels, pixels, tiles.blocks_p * images, tiles.blocks_p, tiles.blocks_c, rows, repeat,
        TILE=tiles.tile,
    )  # fmt: skip
    merge_kernel[(ceil_div(channels, 8),)](partial, out, channels, rows, BLOCK_R=MERGED_ROWS, BLOCK_C=8)
    return out
