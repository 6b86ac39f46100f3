"""Tiles of one image: how every memory-bound kernel splits (N, C, H, W) into programs.

A program handles TILE.pixels by TILE.channels of one image. Offsets inside an image are int32 unless TILE.wide; the
image itself is found with int64, so tensors may exceed 2**31 elements. An operand that is None (a bias, the codes, the
partial sums of a bias gradient) is one of a kernel's constants, so that code without it is compiled.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcnn.shapes import Window, memory_format

WIDE_FROM = 2**31
# Triton's interpreter multiplies bfloat16 matrices as if their bits were integers; float32 products of them are exact.
INTERPRETING = tl.constexpr(triton.knobs.runtime.interpret)
PROGRAMS = 1056  # of a kernel that goes over rows of tiles: enough for every GPU, few enough sums to be merged quickly
LEAST_CHANNELS = 16  # of a tile in channels_last: 16 bytes in any type, and their codes


@triton.jit
def tile_position(BLOCKS_P, BLOCKS_C):
    """Return this program's image, block of pixels and block of channels."""
    pid = tl.program_id(0)
    block_c = pid % BLOCKS_C
    block_p = pid // BLOCKS_C % BLOCKS_P
    return (pid // BLOCKS_C // BLOCKS_P).to(tl.int64), block_p, block_c


@triton.jit
def this_tile(C, P, BLOCKS_P, BLOCKS_C, TILE: tl.constexpr):
    """Return this program's image, its pixels: [P], its channels: [C], and mask and offsets: [P, C] (see tile_at)."""
    n, block_p, block_c = tile_position(BLOCKS_P, BLOCKS_C)
    c = indices(block_c, TILE.channels, TILE.wide)
    p, mask, at = tile_at(n, block_p, c, C, P, TILE)
    return n, p, c, mask, at


@triton.jit
def first_tile(BLOCKS_P, BLOCKS_C, REPEAT):
    """Return row, image, block of pixels and block of channels of a program that goes over REPEAT tiles of a row.

    Rows count the blocks of pixels of all images, one after another.
    """
    row = tl.program_id(0) // BLOCKS_C
    return row, (row * REPEAT // BLOCKS_P).to(tl.int64), row * REPEAT % BLOCKS_P, tl.program_id(0) % BLOCKS_C


@triton.jit
def next_tile(image, block_p, BLOCKS_P):
    """Return image and block of pixels that follow."""
    block_p += 1
    wraps = block_p == BLOCKS_P
    return image + wraps.to(tl.int64), tl.where(wraps, 0, block_p)


@triton.jit
def indices(block, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """Return the BLOCK indices of a block, in int64 where an image has 2**31 elements or more."""
    if WIDE:
        block = block.to(tl.int64)
    return block * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def offset(channel, pixel, C, P, CHANNELS_LAST: tl.constexpr):
    """Return the offset inside an image of C channels and P pixels."""
    return pixel * C + channel if CHANNELS_LAST else channel * P + pixel


@triton.jit
def tile_at(image, block_p, c, C, P, TILE: tl.constexpr):
    """Return a tile's pixels: [P], which of its elements the image has, and their offsets in the tensor: [P, C]."""
    p = indices(block_p, TILE.pixels, TILE.wide)
    mask = (p < P)[:, None] & (c < C)[None, :]
    return p, mask, image * C * P + offset(c[None, :], p[:, None], C, P, TILE.channels_last)


@triton.jit
def widened(x):
    """Return x in float32; bfloat16 by integer shifts, so that LLVM does not compute in bfloat16, masks included."""
    if x.dtype == tl.bfloat16:
        wide = (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        wide = x.to(tl.float32)
    return wide


@triton.jit
def to_tf32(x):
    """Round float32 to TF32, ties away from zero; tensor cores would truncate: twice the error, and biased."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(x == x, ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True), x)


@triton.jit
def multiply_add(a, b, acc, PRECISION: tl.constexpr):
    """Return a @ b + acc in float32; float32 operands are multiplied in TF32 if PRECISION says so."""
    if INTERPRETING:
        a, b = a.to(tl.float32), b.to(tl.float32)
    elif PRECISION == "tf32":
        a, b = to_tf32(a), to_tf32(b)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def sum_pixels(tile, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Sum a tile [P, C] over its pixels, in two steps: short chains of additions round less."""
    STEP: tl.constexpr = 8 if BLOCK_P % 8 == 0 else BLOCK_P
    return tl.sum(tl.sum(tl.reshape(tile, (BLOCK_P // STEP, STEP, BLOCK_C)), axis=1), axis=0)


def ceil_div(value: int, by: int) -> int:
    """Return the quotient rounded up; Triton's own takes microseconds in Python."""
    return -(-value // by)


def power_of_2(value: int) -> int:
    """Return the least power of two that is at least as large as a positive number."""
    return 1 << (value - 1).bit_length()


class Tile(NamedTuple):
    """A kernel's constants: layout, whether offsets inside an image are int64, and how much a program does at once."""

    channels_last: bool
    wide: bool
    pixels: int
    channels: int


class Tiling(NamedTuple):
    """How many images there are, how many blocks of pixels and of channels one has, and what their tiles are."""

    images: int
    blocks_p: int
    blocks_c: int
    tile: Tile

    @property
    def grid(self) -> tuple[int]:
        """Return the grid of programs of one tile each."""
        return (self.images * self.blocks_p * self.blocks_c,)

    def walk(self, most: int | None = None) -> tuple[int, tuple[int], tuple[int, int, int, int]]:
        """Return of programs that go over rows of tiles: the rows, the grid, and TILES, BLOCKS_P, BLOCKS_C, REPEAT.

        Rows count the tiles of all images, and have up to `most` of them where there are PROGRAMS all the same.
        """
        total = self.blocks_p * self.images
        repeat = max(1, min(most or total, total * self.blocks_c // PROGRAMS))
        rows = ceil_div(total, repeat)
        return rows, (rows * self.blocks_c,), (total, self.blocks_p, self.blocks_c, repeat)


def planes(x: Tensor) -> tuple[int, int, int]:
    """Return images, channels and pixels of (N, C, *)."""
    return x.shape[0], x.shape[1], math.prod(x.shape[2:])


def tiling(images: int, channels: int, pixels: int, channels_last: bool, wide: bool, elements: int) -> Tiling:
    """Split images into tiles of about `elements`, long in the axis that is contiguous.

    In channels_last a tile's channels divide the image's where that leaves enough of them, so that no lane idles.
    """
    pixels, channels = max(pixels, 1), max(channels, 1)
    if channels_last:
        divisor = channels & -channels
        block_c = min(divisor if divisor >= LEAST_CHANNELS else power_of_2(channels), 64)
        block_p = min(power_of_2(pixels), elements // block_c)
    else:
        block_p = min(power_of_2(pixels), elements)
        block_c = min(power_of_2(channels), elements // block_p)
    tile = Tile(channels_last, wide, block_p, block_c)
    return Tiling(images, ceil_div(pixels, block_p), ceil_div(channels, block_c), tile)


def pairs_up(window: Window, height: int, width: int) -> bool:
    """Whether 2x2 windows side by side cover the image, with an even number of them in a row."""
    return window[:4] == ((2, 2), (2, 2), (0, 0), (1, 1)) and height % 2 == 0 and width % 4 == 0


def row_vector(width: int, most: int) -> int:
    """Return the largest power of two that divides a row, up to a number."""
    return min(width & -width, most)


def laid_out(tensor: Tensor) -> tuple[Tensor, torch.memory_format, bool]:
    """Return the tensor without gaps, its memory format, and whether channels are the fastest axis in it."""
    format = memory_format(tensor)  # microseconds of Python: once a tensor
    return tensor.contiguous(memory_format=format), format, format != torch.contiguous_format


def vector(values: Tensor | None) -> Tensor | None:
    """Return a channel's numbers as a dense tensor, or None for None."""
    return None if values is None else values.contiguous()


def is_wide(*tensors: Tensor) -> bool:
    """Whether one image of any of these has too many elements for int32 offsets."""
    return any(t.numel() // max(t.shape[0], 1) >= WIDE_FROM for t in tensors)


def fits_int32(*tensors: Tensor) -> bool:
    """Whether offsets from a tensor's beginning fit int32, those of a last block that is not full included."""
    return all(t.numel() <= WIDE_FROM - 2**14 for t in tensors)


def new_partial(grad: Tensor, programs: int, wanted: bool) -> Tensor | None:
    """Return room for the bias gradient's partial sums, one row a program; they are added in a fixed order."""
    return grad.new_empty((programs if grad.numel() else 0, grad.shape[1]), dtype=torch.float32) if wanted else None


def added(partial: Tensor | None, grad: Tensor) -> Tensor:
    """Return the bias gradient, in the gradient's dtype; without elements where it is not wanted."""
    return grad.new_empty(0) if partial is None else partial.sum(0).to(grad.dtype)
