"""Batch norm + ReLU in Triton: normalize + ReLU in one pass; backward: two sums in one, the gradient in another.

Layout: NCHW or NHWC, one program a tile of pixels and channels (see tiles.py). The backward kernels unpool on their
way where a max-pool follows (bn_relu_pool.py).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcnn.shapes import Window
from fastcnn.triton.bn_statistics import MERGED_ROWS, Norm, channel_numbers, normalized, partial_rows
from fastcnn.triton.max_pool_backward import unpool
from fastcnn.triton.tiles import ceil_div, first_tile, indices, is_wide, laid_out, next_tile, planes, tile_at, tiling

MOST_TILES = 16  # of a program: it computes its channels' numbers once


@triton.jit(do_not_specialize=["TILES", "REPEAT"])
def bn_relu_kernel(x_ptr, y_ptr, norm, C, P, TILES, BLOCKS_P, BLOCKS_C, REPEAT, TILE: tl.constexpr):
    """Normalize x: (N, C, P) and apply ReLU; one program computes REPEAT of all TILES of pixels."""
    row, image, block_p, block_c = first_tile(BLOCKS_P, BLOCKS_C, REPEAT)
    c = indices(block_c, TILE.channels, TILE.wide)
    numbers = channel_numbers(norm, c, C, 0)
    for _ in range(tl.minimum(REPEAT, TILES - row * REPEAT)):
        _, mask, at = tile_at(image, block_p, c, C, P, TILE)
        y = normalized(tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32), numbers)
        tl.store(y_ptr + at, tl.where(y <= 0.0, 0.0, y).to(y_ptr.dtype.element_ty), mask=mask)
        image, block_p = next_tile(image, block_p, BLOCKS_P)


@triton.jit
def flowing_gradient(
    grad_ptr, code_ptr, x, numbers, n, p, c, mask, at, C, W, OH, OW, WINDOW: tl.constexpr, CHANNELS_LAST: tl.constexpr
):
    """Return the gradient of the normalized values, [P, C]: unpooled by the codes, or masked by the ReLU."""
    if WINDOW is not None:
        image = n * C * OH * OW
        return unpool(
            grad_ptr + image, code_ptr + image, p // W, p % W, c, mask, C, OH, OW, WINDOW, CHANNELS_LAST
        )  # fmt: skip
    grad = tl.load(grad_ptr + at, mask=mask, other=0.0)
    # rounded like the output, so that the mask is that of the output
    y = normalized(x, numbers).to(grad_ptr.dtype.element_ty).to(tl.float32)
    return tl.where(y <= 0.0, 0.0, grad.to(tl.float32))


@triton.jit(do_not_specialize=["TILES", "ROWS", "REPEAT"])
def sums_kernel(
    grad_ptr, code_ptr, x_ptr, partial_ptr, norm, C, P, W, OH, OW, ROWS, TILES, BLOCKS_P, BLOCKS_C, REPEAT,
    WINDOW: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Sum the gradient, and the gradient times (x - mean), into one row of partial: (2, ROWS, C).

    One program goes over REPEAT of all TILES of pixels. The WINDOW is that of the pool after it, or None.
    """
    row, image, block_p, block_c = first_tile(BLOCKS_P, BLOCKS_C, REPEAT)
    c = indices(block_c, TILE.channels, TILE.wide)
    numbers = channel_numbers(norm, c, C, 0)
    plain = tl.full((TILE.pixels, TILE.channels), 0.0, tl.float32)
    times = tl.full((TILE.pixels, TILE.channels), 0.0, tl.float32)
    for _ in range(tl.minimum(REPEAT, TILES - row * REPEAT)):
        p, mask, at = tile_at(image, block_p, c, C, P, TILE)
        x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
        grad = flowing_gradient(
            grad_ptr, code_ptr, x, numbers, image, p, c, mask, at, C, W, OH, OW, WINDOW, TILE.channels_last
        )
        plain += grad
        times += tl.where(mask, grad * (x - numbers[0]), 0.0)
        image, block_p = next_tile(image, block_p, BLOCKS_P)
    at = partial_ptr + row.to(tl.int64) * C + c
    tl.store(at, tl.sum(plain, axis=0).to(tl.float64), mask=c < C)
    tl.store(at + ROWS * C, tl.sum(times, axis=0).to(tl.float64), mask=c < C)


@triton.jit(do_not_specialize=["ROWS"])
def merge_sums_kernel(
    partial_ptr, variance_ptr, sums_ptr, times_ptr, eps, C, ROWS, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Add up partial: (2, ROWS, C) to the sums of the gradient and of gradient times normalized x, (C,) each."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    plain = tl.zeros((BLOCK_R, BLOCK_C), tl.float64)
    times = tl.zeros((BLOCK_R, BLOCK_C), tl.float64)
    for start in range(0, ROWS, BLOCK_R):
        at, mask = partial_rows(partial_ptr, start, c, C, ROWS, BLOCK_R)
        plain += tl.load(at, mask=mask, other=0.0)
        times += tl.load(at + ROWS * C, mask=mask, other=0.0)
    deviation = tl.sqrt_rn(tl.load(variance_ptr + c, mask=c < C, other=1.0) + eps)
    tl.store(sums_ptr + c, tl.sum(plain, axis=0), mask=c < C)
    tl.store(times_ptr + c, tl.sum(times, axis=0) / deviation, mask=c < C)


@triton.jit(do_not_specialize=["TILES", "REPEAT"])
def gradient_kernel(
    grad_ptr, code_ptr, x_ptr, dx_ptr, sums_ptr, times_ptr, norm, count, C, P, W, OH, OW, TILES, BLOCKS_P, BLOCKS_C,
    REPEAT, TRAINING: tl.constexpr, WINDOW: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Write dx: (N, C, P); in training with the terms of the batch's mean and variance, from the two sums.

    One program goes over REPEAT of all TILES of pixels.
    """
    row, image, block_p, block_c = first_tile(BLOCKS_P, BLOCKS_C, REPEAT)
    c = indices(block_c, TILE.channels, TILE.wide)
    numbers = channel_numbers(norm, c, C, 0)
    mean, inverse, weight, _ = numbers
    if TRAINING:
        average = tl.load(sums_ptr + c, mask=c < C, other=0.0)[None, :] / count
        slope = tl.load(times_ptr + c, mask=c < C, other=0.0)[None, :] / count * inverse
    for _ in range(tl.minimum(REPEAT, TILES - row * REPEAT)):
        p, mask, at = tile_at(image, block_p, c, C, P, TILE)
        x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
        grad = flowing_gradient(
            grad_ptr, code_ptr, x, numbers, image, p, c, mask, at, C, W, OH, OW, WINDOW, TILE.channels_last
        )
        if TRAINING:
            grad -= average + (x - mean) * slope
        tl.store(dx_ptr + at, (grad * (inverse * weight)).to(dx_ptr.dtype.element_ty), mask=mask)
        image, block_p = next_tile(image, block_p, BLOCKS_P)


def normalize_relu(x: Tensor, y: Tensor, norm: Norm, channels_last: bool) -> None:
    """Launch the forward kernel over dense tensors with elements: x: (N, C, *) into y, which may be x."""
    _, channels, pixels = planes(x)
    tiles = tiling(*planes(x), channels_last, is_wide(x), elements=1024)
    _, grid, numbers = tiles.walk(MOST_TILES)
    bn_relu_kernel[grid](x, y, norm, channels, pixels, *numbers, TILE=tiles.tile)


def bn_relu(input: Tensor, *numbers) -> Tensor:
    """Operator ``fastcnn::bn_relu.triton``."""
    x, format, channels_last = laid_out(input)
    y = torch.empty_like(x, memory_format=format)
    if x.numel():
        normalize_relu(x, y, Norm.of(*numbers), channels_last)
    return y


def backward(
    grad: Tensor, codes: Tensor | None, input: Tensor, norm: Norm, training: bool, window: Window | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the two passes: the gradients of input, weight and bias; codes and window belong to the pool after it."""
    x, format, channels_last = laid_out(input)
    grad = grad.contiguous(memory_format=format)
    images, channels, pixels = planes(x)
    dx = torch.empty_like(x, memory_format=format)
    grad_bias, grad_weight = (x.new_empty(channels, dtype=torch.float32) for _ in range(2))
    if x.numel() == 0:
        return dx, grad_weight.zero_(), grad_bias.zero_()
    tiles = tiling(*planes(x), channels_last, is_wide(x, grad), elements=1024)
    rows, grid, numbers = tiles.walk()
    partial = x.new_empty((2, rows, channels), dtype=torch.float64)
    out_size = grad.shape[-2:] if window else (0, 0)
    plane = channels, pixels, x.shape[-1], *out_size
    constants = {"WINDOW": window, "TILE": tiles.tile}
    sums_kernel[grid](grad, codes, x, partial, norm, *plane, rows, *numbers, **constants)
    merge_sums_kernel[(ceil_div(channels, 8),)](
        partial, norm.variance, grad_bias, grad_weight, norm.eps, channels, rows, BLOCK_R=MERGED_ROWS, BLOCK_C=8
    )
    _, grid, numbers = tiles.walk(MOST_TILES)
    count = float(images * pixels)
    gradient_kernel[grid](
        grad, codes, x, dx, grad_bias, grad_weight, norm, count, *plane, *numbers, TRAINING=training, **constants
    )
    return dx, grad_weight, grad_bias


def bn_relu_backward(grad: Tensor, input: Tensor, *norm) -> tuple[Tensor, Tensor, Tensor]:
    """Operator ``fastcnn::bn_relu_backward.triton``."""
    *numbers, training = norm
    return backward(grad, None, input, Norm.of(*numbers), training, None)
