"""Batch norm + ReLU in Triton: normalize + ReLU in one pass; backward: two sums in one, the gradient in another.

Layout: NCHW or NHWC, one program a tile of pixels and channels (see tiles.py). The backward kernels unpool on their
way where a max-pool follows (bn_relu_pool.py).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcnn.shapes import Window, memory_format
from fastcnn.triton.bn_statistics import MERGED_ROWS, PROGRAMS, planes, summing
from fastcnn.triton.max_pool_backward import unpool
from fastcnn.triton.tiles import (
    ceil_div,
    dense,
    first_tile,
    indices,
    is_channels_last,
    is_wide,
    next_tile,
    offset,
    rows_of,
    tiling,
    vector,
)

MOST_TILES = 16  # of a program: it computes its channels' numbers once


@triton.jit
def channel_numbers(mean_ptr, variance_ptr, weight_ptr, bias_ptr, c, C, eps,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Return mean, 1 / standard deviation, weight and bias of channels, each [1, C]."""
    mask = c < C
    mean = tl.load(mean_ptr + c, mask=mask, other=0.0)
    inverse = tl.div_rn(1.0, tl.sqrt_rn(tl.load(variance_ptr + c, mask=mask, other=1.0) + eps))
    weight = tl.load(weight_ptr + c, mask=mask, other=1.0) if HAS_WEIGHT else tl.full(c.shape, 1.0, tl.float32)
    bias = tl.load(bias_ptr + c, mask=mask, other=0.0) if HAS_BIAS else tl.zeros(c.shape, tl.float32)
    return mean[None, :], inverse[None, :], weight[None, :], bias[None, :]


@triton.jit(do_not_specialize=["TILES", "REPEAT"])
def bn_relu_kernel(
    x_ptr,
    y_ptr,
    mean_ptr,
    variance_ptr,
    weight_ptr,
    bias_ptr,
    eps,
    C,
    P,
    TILES,
    BLOCKS_P,
    BLOCKS_C,
    REPEAT,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Normalize x: (N, C, P) and apply ReLU; one program computes REPEAT of all TILES of pixels."""
    row, image, block_p, block_c = first_tile(BLOCKS_P, BLOCKS_C, REPEAT)
    c = indices(block_c, BLOCK_C, WIDE)
    mean, inverse, weight, bias = channel_numbers(
        mean_ptr, variance_ptr, weight_ptr, bias_ptr, c, C, eps, HAS_WEIGHT, HAS_BIAS
    )
    for _ in range(tl.minimum(REPEAT, TILES - row * REPEAT)):
        p = indices(block_p, BLOCK_P, WIDE)
        mask = (p < P)[:, None] & (c < C)[None, :]
        at = image * C * P + offset(c[None, :], p[:, None], C, P, CHANNELS_LAST)
        x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
        y = (x - mean) * (inverse * weight) + bias
        tl.store(y_ptr + at, tl.where(y <= 0.0, 0.0, y).to(y_ptr.dtype.element_ty), mask=mask)
        image, block_p = next_tile(image, block_p, BLOCKS_P)


@triton.jit
def flowing_gradient(
    grad_ptr, code_ptr, x, mean, inverse, weight, bias, n, p, c, mask, C, P, W, OH, OW,
    POOLED: tl.constexpr, WINDOW: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """Return the gradient of the normalized values, [P, C]: unpooled by the codes, or masked by the ReLU."""
    if POOLED:
        image = n * C * OH * OW
        return unpool(
            grad_ptr + image, code_ptr + image, p // W, p % W, c, mask, C, OH, OW, WINDOW, CHANNELS_LAST
        )  # fmt: skip
    at = n * C * P + offset(c[None, :], p[:, None], C, P, CHANNELS_LAST)
    grad = tl.load(grad_ptr + at, mask=mask, other=0.0)
    # rounded like the output, so that the mask is that of the output
    y = ((x - mean) * (inverse * weight) + bias).to(grad_ptr.dtype.element_ty).to(tl.float32)
    return tl.where(y <= 0.0, 0.0, grad.to(tl.float32))


@triton.jit(do_not_specialize=["TILES", "ROWS", "REPEAT"])
def sums_kernel(
    grad_ptr,
    code_ptr,
    x_ptr,
    partial_ptr,
    mean_ptr,
    variance_ptr,
    weight_ptr,
    bias_ptr,
    eps,
    C,
    P,
    W,
    OH,
    OW,
    TILES,
    BLOCKS_P,
    BLOCKS_C,
    ROWS,
    REPEAT,
    POOLED: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sum the gradient, and the gradient times (x - mean), into one row of partial: (2, ROWS, C).

    One program goes over REPEAT of all TILES of pixels.
    """
    row, image, block_p, block_c = first_tile(BLOCKS_P, BLOCKS_C, REPEAT)
    c = indices(block_c, BLOCK_C, WIDE)
    mean, inverse, weight, bias = channel_numbers(
        mean_ptr, variance_ptr, weight_ptr, bias_ptr, c, C, eps, HAS_WEIGHT, HAS_BIAS
    )
    plain = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    times = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for _ in range(tl.minimum(REPEAT, TILES - row * REPEAT)):
        p = indices(block_p, BLOCK_P, WIDE)
        mask = (p < P)[:, None] & (c < C)[None, :]
        at = image * C * P + offset(c[None, :], p[:, None], C, P, CHANNELS_LAST)
        x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
        grad = flowing_gradient(
            grad_ptr, code_ptr, x, mean, inverse, weight, bias, image, p, c, mask, C, P, W, OH, OW, POOLED, WINDOW,
            CHANNELS_LAST,
        )  # fmt: skip
        plain += grad
        times += tl.where(mask, grad * (x - mean), 0.0)
        image, block_p = next_tile(image, block_p, BLOCKS_P)
    at = partial_ptr + row.to(tl.int64) * C + c
    tl.store(at, tl.sum(plain.to(tl.float64), axis=0), mask=c < C)
    tl.store(at + ROWS * C, tl.sum(times.to(tl.float64), axis=0), mask=c < C)


@triton.jit(do_not_specialize=["ROWS"])
def merge_sums_kernel(
    partial_ptr,
    variance_ptr,
    sums_ptr,
    times_ptr,
    eps,
    C,
    ROWS,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Add up partial: (2, ROWS, C) to the sums of the gradient and of gradient times normalized x, (C,) each."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    plain = tl.zeros((BLOCK_R, BLOCK_C), tl.float64)
    times = tl.zeros((BLOCK_R, BLOCK_C), tl.float64)
    for start in range(0, ROWS, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        mask = (row < ROWS)[:, None] & (c < C)[None, :]
        at = partial_ptr + row[:, None].to(tl.int64) * C + c[None, :]
        plain += tl.load(at, mask=mask, other=0.0)
        times += tl.load(at + ROWS * C, mask=mask, other=0.0)
    deviation = tl.sqrt_rn(tl.load(variance_ptr + c, mask=c < C, other=1.0) + eps)
    tl.store(sums_ptr + c, tl.sum(plain, axis=0), mask=c < C)
    tl.store(times_ptr + c, tl.sum(times, axis=0) / deviation, mask=c < C)


@triton.jit(do_not_specialize=["TILES", "REPEAT"])
def gradient_kernel(
    grad_ptr,
    code_ptr,
    x_ptr,
    dx_ptr,
    sums_ptr,
    times_ptr,
    mean_ptr,
    variance_ptr,
    weight_ptr,
    bias_ptr,
    eps,
    count,
    C,
    P,
    W,
    OH,
    OW,
    TILES,
    BLOCKS_P,
    BLOCKS_C,
    REPEAT,
    TRAINING: tl.constexpr,
    POOLED: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Write dx: (N, C, P); in training with the terms of the batch's mean and variance, from the two sums.

    One program goes over REPEAT of all TILES of pixels.
    """
    row, image, block_p, block_c = first_tile(BLOCKS_P, BLOCKS_C, REPEAT)
    c = indices(block_c, BLOCK_C, WIDE)
    mean, inverse, weight, bias = channel_numbers(
        mean_ptr, variance_ptr, weight_ptr, bias_ptr, c, C, eps, HAS_WEIGHT, HAS_BIAS
    )
    if TRAINING:
        average = tl.load(sums_ptr + c, mask=c < C, other=0.0)[None, :] / count
        slope = tl.load(times_ptr + c, mask=c < C, other=0.0)[None, :] / count * inverse
    for _ in range(tl.minimum(REPEAT, TILES - row * REPEAT)):
        p = indices(block_p, BLOCK_P, WIDE)
        mask = (p < P)[:, None] & (c < C)[None, :]
        at = image * C * P + offset(c[None, :], p[:, None], C, P, CHANNELS_LAST)
        x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
        grad = flowing_gradient(
            grad_ptr, code_ptr, x, mean, inverse, weight, bias, image, p, c, mask, C, P, W, OH, OW, POOLED, WINDOW,
            CHANNELS_LAST,
        )  # fmt: skip
        if TRAINING:
            grad -= average + (x - mean) * slope
        tl.store(dx_ptr + at, (grad * (inverse * weight)).to(dx_ptr.dtype.element_ty), mask=mask)
        image, block_p = next_tile(image, block_p, BLOCKS_P)


class Norm(NamedTuple):
    """Mean, variance, weight and bias, (C,) each, as the kernels read them."""

    mean: Tensor
    variance: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float

    @classmethod
    def of(cls, mean: Tensor, variance: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> "Norm":
        """Return the numbers of an operator's arguments without gaps."""
        return cls(mean.contiguous(), variance.contiguous(), vector(weight), vector(bias), eps)

    def flags(self) -> dict[str, bool]:
        """Return the kernels' constants."""
        return {"HAS_WEIGHT": self.weight is not None, "HAS_BIAS": self.bias is not None}


def bn_relu(input: Tensor, *numbers) -> Tensor:
    """Operator ``fastcnn::bn_relu.triton``."""
    norm, x = Norm.of(*numbers), dense(input)
    images, channels, pixels = planes(x)
    channels_last = is_channels_last(input)
    y = torch.empty_like(x, memory_format=memory_format(input))
    if x.numel() == 0:
        return y
    tiles = tiling(pixels, channels, channels_last, elements=1024)
    rows, repeat = rows_of(tiles, images, MOST_TILES, PROGRAMS)
    bn_relu_kernel[(rows * tiles.blocks_c,)](
        x, y, *norm, channels, pixels, tiles.blocks_p * images, tiles.blocks_p, tiles.blocks_c, repeat, **norm.flags(),
        CHANNELS_LAST=channels_last, WIDE=is_wide(x), BLOCK_P=tiles.block_p, BLOCK_C=tiles.block_c,
    )  # fmt: skip
    return y


def backward(
    grad: Tensor, codes: Tensor | None, input: Tensor, norm: Norm, training: bool, window: Window | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the two passes: the gradients of input, weight and bias; codes and window belong to the pool after it."""
    x, format = dense(input), memory_format(input)
    grad = grad.contiguous(memory_format=format)
    images, channels, pixels = planes(x)
    out_height, out_width = grad.shape[-2:] if window else (0, 0)
    channels_last = is_channels_last(input)
    flags = {
        "POOLED": window is not None,
        "WINDOW": window,
        **norm.flags(),
        "CHANNELS_LAST": channels_last,
        "WIDE": is_wide(x, grad),
    }
    dx = torch.empty_like(x, memory_format=format)
    grad_bias, grad_weight = (x.new_empty(channels, dtype=torch.float32) for _ in range(2))
    if x.numel() == 0:
        return dx, grad_weight.zero_(), grad_bias.zero_()
    tiles, rows, repeat = summing(images, pixels, channels, channels_last)
    partial = x.new_empty((2, rows, channels), dtype=torch.float64)
    plane = (channels, pixels, x.shape[-1], out_height, out_width)
    every = tiles.blocks_p * images
    sums_kernel[(rows * tiles.blocks_c,)](
        grad, codes, x, partial, *norm, *plane, every, tiles.blocks_p, tiles.blocks_c, rows, repeat,
        **flags, BLOCK_P=tiles.block_p, BLOCK_C=tiles.block_c,
    )  # fmt: skip
    merge_sums_kernel[(ceil_div(channels, 8),)](
        partial, norm.variance, grad_bias, grad_weight, norm.eps, channels, rows, BLOCK_R=MERGED_ROWS, BLOCK_C=8
    )
    rows, repeat = rows_of(tiles, images, MOST_TILES, PROGRAMS)
    gradient_kernel[(rows * tiles.blocks_c,)](
        grad, codes, x, dx, grad_bias, grad_weight, *norm, float(images * pixels), *plane,
        every, tiles.blocks_p, tiles.blocks_c, repeat,
        TRAINING=training, **flags, BLOCK_P=tiles.block_p, BLOCK_C=tiles.block_c,
    )  # fmt: skip
    return dx, grad_weight, grad_bias


def bn_relu_backward(grad: Tensor, input: Tensor, *norm) -> tuple[Tensor, Tensor, Tensor]:
    """Operator ``fastcnn::bn_relu_backward.triton``."""
    *numbers, training = norm
    return backward(grad, None, input, Norm.of(*numbers), training, None)
