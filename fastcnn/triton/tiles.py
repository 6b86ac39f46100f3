"""Tiles of one image: how every memory-bound kernel splits (N, C, H, W) into programs.

A program handles BLOCK_P pixels by BLOCK_C channels of one image. Offsets inside an image are int32 unless WIDE;
the image itself is found with int64, so tensors may exceed 2**31 elements.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcnn.shapes import memory_format

WIDE_FROM = 2**31
# Triton's interpreter multiplies bfloat16 matrices as if their bits were integers; float32 products of them are exact.
INTERPRETING = tl.constexpr(triton.knobs.runtime.interpret)
REPEAT = 8  # tiles of pixels that one program sums for a bias gradient: fewer partial sums to add up


@triton.jit
def tile_position(BLOCKS_P, BLOCKS_C):
    """Return this program's image, block of pixels and block of channels."""
    pid = tl.program_id(0)
    block_c = pid % BLOCKS_C
    block_p = pid // BLOCKS_C % BLOCKS_P
    return (pid // BLOCKS_C // BLOCKS_P).to(tl.int64), block_p, block_c


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
def to_tf32(x):
    """Round float32 to TF32, ties away from zero: tensor cores would cut it, with twice the error and to one side."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(x == x, ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True), x)


@triton.jit
def multiply_add(a, b, acc, PRECISION: tl.constexpr):
    """Return a @ b + acc, in float32; of float32 by way of TF32 where PRECISION says so and the GPU has it."""
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


class Tiling(NamedTuple):
    """How many blocks an image has and how large each is."""

    blocks_p: int
    blocks_c: int
    block_p: int
    block_c: int

    def grid(self, images: int) -> tuple[int]:
        """Return the launch grid."""
        return (images * self.blocks_p * self.blocks_c,)


def tiling(pixels: int, channels: int, channels_last: bool, elements: int, repeat: int = 1) -> Tiling:
    """Split an image into tiles of about `elements`, long in the axis that is contiguous.

    A program goes over `repeat` tiles of pixels, one after another.
    """
    pixels, channels = max(pixels, 1), max(channels, 1)
    if channels_last:
        block_c = min(triton.next_power_of_2(channels), 64)
        block_p = min(triton.next_power_of_2(pixels), elements // block_c)
    else:
        block_p = min(triton.next_power_of_2(pixels), elements)
        block_c = min(triton.next_power_of_2(channels), elements // block_p)
    return Tiling(triton.cdiv(pixels, block_p * repeat), triton.cdiv(channels, block_c), block_p, block_c)


def is_channels_last(tensor: Tensor) -> bool:
    """Whether channels are the fastest axis of a dense tensor from `dense`."""
    return memory_format(tensor) != torch.contiguous_format


def dense(tensor: Tensor) -> Tensor:
    """Return the tensor without gaps, in its own memory format."""
    return tensor.contiguous(memory_format=memory_format(tensor))


def vector(values: Tensor | None) -> Tensor | None:
    """Return a channel's numbers, if there are any, without the gaps of a view."""
    return None if values is None else values.contiguous()


def is_wide(*tensors: Tensor) -> bool:
    """Whether one image of any of these has too many elements for int32 offsets."""
    return any(t.numel() // max(t.shape[0], 1) >= WIDE_FROM for t in tensors)


def new_partial(grad: Tensor, programs: int, wanted: bool) -> Tensor:
    """Return room for the bias gradient's partial sums, one row a program; they are added in a fixed order."""
    return grad.new_empty((programs if grad.numel() else 0, grad.shape[1] if wanted else 0), dtype=torch.float32)
