"""Local response normalisation in Triton: one read and one write forward; two reads and one write backward.

The neighbours of a channel are loaded again at shifted offsets: they come from the cache, not from memory, in either
layout, and no running sum carries rounding errors or a NaN from one channel to the next.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcnn.shapes import LRN, memory_format
from fastcnn.triton.tiles import dense, indices, is_channels_last, is_wide, offset, tile_position, tiling

# Windows of up to so many channels are unrolled: what neighbouring windows share is then loaded and computed once.
UNROLLED = tl.constexpr(8)


@triton.jit
def load_channel(ptr, c, p, mask, C, P, CHANNELS_LAST: tl.constexpr):
    """Load (c, p) of an image in float32: c: [C], p: [P], mask: [P, C]; channels outside the image read as zero."""
    here = mask & ((c >= 0) & (c < C))[None, :]
    at = offset(c[None, :], p[:, None], C, P, CHANNELS_LAST)
    return tl.load(ptr + at, mask=here, other=0.0).to(tl.float32)


@triton.jit
def window_scale(x_ptr, c, p, mask, C, P, SIZE: tl.constexpr, alpha, k, CHANNELS_LAST: tl.constexpr):
    """Return k + alpha / size * the sum of x**2 over each channel's window: [P, C]."""
    total = tl.zeros(mask.shape, tl.float32)
    if SIZE <= UNROLLED:
        for j in tl.static_range(SIZE):
            x = load_channel(x_ptr, c + (j - SIZE // 2), p, mask, C, P, CHANNELS_LAST)
            total += x * x
    else:
        for j in range(SIZE):
            x = load_channel(x_ptr, c + (j - SIZE // 2), p, mask, C, P, CHANNELS_LAST)
            total += x * x
    return k + alpha / SIZE * total


@triton.jit
def power(scale, beta, KIND: tl.constexpr):
    """Return scale ** -beta; KIND "3/4" is beta = 0.75 without a logarithm, "0" is beta = 0."""
    if KIND == "3/4":
        root = tl.rsqrt(scale)
        return root * tl.sqrt(root)
    if KIND == "0":
        return tl.full(scale.shape, 1.0, tl.float32)
    return tl.exp2(-beta * tl.log2(scale))


@triton.jit
def normalise(x_ptr, c, p, mask, C, P, SIZE: tl.constexpr, alpha, beta, k, KIND: tl.constexpr, CL: tl.constexpr):
    """Return x * scale ** -beta: [P, C] of an image."""
    x = load_channel(x_ptr, c, p, mask, C, P, CL)
    return x * power(window_scale(x_ptr, c, p, mask, C, P, SIZE, alpha, k, CL), beta, KIND)


@triton.jit
def lrn_kernel(
    x_ptr,
    y_ptr,
    C,
    P,
    BLOCKS_P,
    BLOCKS_C,
    alpha,
    beta,
    k,
    SIZE: tl.constexpr,
    KIND: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Normalise x: (N, C, P) into y; one program computes one tile."""
    n, block_p, block_c = tile_position(BLOCKS_P, BLOCKS_C)
    p = indices(block_p, BLOCK_P, WIDE)
    c = indices(block_c, BLOCK_C, WIDE)
    mask = (p < P)[:, None] & (c < C)[None, :]
    y = normalise(x_ptr + n * C * P, c, p, mask, C, P, SIZE, alpha, beta, k, KIND, CHANNELS_LAST)
    at = n * C * P + offset(c[None, :], p[:, None], C, P, CHANNELS_LAST)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def window_term(
    x_ptr, grad_ptr, c, j, p, mask, C, P, SIZE: tl.constexpr, alpha, beta, k, KIND: tl.constexpr, CL: tl.constexpr
):
    """Return grad * x * s ** (-beta - 1) of the j-th channel whose window holds c: c - (size - 1) // 2 + j."""
    if KIND == "0":  # beta takes it times zero, and a scale may be zero
        return tl.zeros(mask.shape, tl.float32)
    other = c + (j - (SIZE - 1) // 2)
    scale = window_scale(x_ptr, other, p, mask, C, P, SIZE, alpha, k, CL)
    grad = load_channel(grad_ptr, other, p, mask, C, P, CL)
    x = load_channel(x_ptr, other, p, mask, C, P, CL)
    return tl.where(((other >= 0) & (other < C))[None, :], grad * x * power(scale, beta, KIND) / scale, 0.0)


@triton.jit
def lrn_backward_kernel(
    x_ptr,
    grad_ptr,
    dx_ptr,
    C,
    P,
    BLOCKS_P,
    BLOCKS_C,
    alpha,
    beta,
    k,
    SIZE: tl.constexpr,
    KIND: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Dx = grad * s ** -beta - 2 alpha beta / size * x * sum of grad * x * s ** (-beta - 1) over windows that hold c.

    x, grad, dx: (N, C, P); one program computes one tile.
    """
    n, block_p, block_c = tile_position(BLOCKS_P, BLOCKS_C)
    p = indices(block_p, BLOCK_P, WIDE)
    c = indices(block_c, BLOCK_C, WIDE)
    mask = (p < P)[:, None] & (c < C)[None, :]
    image = n * C * P
    x_ptr += image
    grad_ptr += image
    through = tl.zeros(mask.shape, tl.float32)
    if SIZE <= UNROLLED:
        for j in tl.static_range(SIZE):
            through += window_term(x_ptr, grad_ptr, c, j, p, mask, C, P, SIZE, alpha, beta, k, KIND, CHANNELS_LAST)
    else:
        for j in range(SIZE):
            through += window_term(x_ptr, grad_ptr, c, j, p, mask, C, P, SIZE, alpha, beta, k, KIND, CHANNELS_LAST)
    x = load_channel(x_ptr, c, p, mask, C, P, CHANNELS_LAST)
    grad = load_channel(grad_ptr, c, p, mask, C, P, CHANNELS_LAST)
    scale = window_scale(x_ptr, c, p, mask, C, P, SIZE, alpha, k, CHANNELS_LAST)
    dx = grad * power(scale, beta, KIND) - 2.0 * alpha * beta / SIZE * x * through
    at = image + offset(c[None, :], p[:, None], C, P, CHANNELS_LAST)
    tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=mask)


def power_kind(beta: float) -> str:
    """Return which formula serves this beta."""
    return {0.75: "3/4", 0.0: "0"}.get(beta, "any")


def reaching(norm: LRN, channels: int) -> LRN:
    """Return the norm with a window no wider than holds all channels wherever it lies, and its part of alpha."""
    size = min(norm.size, 2 * channels + 1)
    return norm._replace(size=size, alpha=norm.alpha * (size / norm.size))


def launch(kernel, tensors: tuple[Tensor, ...], norm: LRN) -> None:
    """Launch a kernel over dense tensors of the same (N, C, *) and layout."""
    x = tensors[0]
    if x.numel() == 0:
        return
    images, channels = x.shape[:2]
    norm = reaching(norm, channels)
    pixels = x[0, 0].numel()
    channels_last = is_channels_last(x)
    tiles = tiling(pixels, channels, channels_last, elements=512)
    kernel[tiles.grid(images)](
        *tensors, channels, pixels, tiles.blocks_p, tiles.blocks_c, norm.alpha, norm.beta, norm.k,
        SIZE=norm.size, KIND=power_kind(norm.beta), CHANNELS_LAST=channels_last, WIDE=is_wide(x),
        BLOCK_P=tiles.block_p, BLOCK_C=tiles.block_c,
    )  # fmt: skip


def lrn(input: Tensor, *norm) -> Tensor:
    """Operator ``fastcnn::lrn.triton``."""
    x = dense(input)
    y = torch.empty_like(x, memory_format=memory_format(input))
    launch(lrn_kernel, (x, y), LRN(*norm))
    return y


def lrn_backward(grad: Tensor, input: Tensor, *norm) -> Tensor:
    """Operator ``fastcnn::lrn_backward.triton``."""
    format = memory_format(input)
    dx = torch.empty_like(input, memory_format=format)
    launch(lrn_backward_kernel, (dense(input), grad.contiguous(memory_format=format), dx), LRN(*norm))
    return dx
