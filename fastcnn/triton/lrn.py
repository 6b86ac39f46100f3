"""Local response normalization in Triton: one read and one write forward; two reads and one write backward.

Short windows go by columns (lrn_columns.py). Otherwise the neighbours of a channel are loaded again at shifted offsets:
they come from the cache, not from memory. In either case no running sum carries rounding errors or a NaN from one
channel to the next.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcnn.shapes import LRN
from fastcnn.triton.lrn_columns import Columns, Formula, lrn_columns_backward_kernel, lrn_columns_kernel, power
from fastcnn.triton.tiles import ceil_div, is_wide, laid_out, offset, planes, this_tile, tiling

BLOCK = 128  # pixels, or vectors, of a program that goes by columns
NCHW_COLUMNS = 16  # channels of such a program in NCHW
COLUMNS_SIZE = 8  # the largest window that goes by columns


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
    for j in range(SIZE):
        x = load_channel(x_ptr, c + (j - SIZE // 2), p, mask, C, P, CHANNELS_LAST)
        total += x * x
    return k + alpha / SIZE * total


@triton.jit
def lrn_kernel(
    x_ptr, grad_ptr, out_ptr, C, P, BLOCKS_P, BLOCKS_C, alpha, beta, k, NORM: tl.constexpr, TILE: tl.constexpr
):
    """Normalize x: (N, C, P) into out; or, where there is a grad, write that of x: see lrn_columns_backward_kernel.

    One program computes one tile.
    """
    n, p, c, mask, at = this_tile(C, P, BLOCKS_P, BLOCKS_C, TILE)
    x_ptr += n * C * P
    through = tl.zeros(mask.shape, tl.float32)
    if grad_ptr is not None:
        grad_ptr += n * C * P
        for j in range(NORM.size):
            other = c + (j - (NORM.size - 1) // 2)  # the channels whose windows hold c
            scale = window_scale(x_ptr, other, p, mask, C, P, NORM.size, alpha, k, TILE.channels_last)
            term = load_channel(grad_ptr, other, p, mask, C, P, TILE.channels_last)
            term *= load_channel(x_ptr, other, p, mask, C, P, TILE.channels_last) * power(scale, beta, NORM)[1]
            through += tl.where(((other >= 0) & (other < C))[None, :], term, 0.0)
    x = load_channel(x_ptr, c, p, mask, C, P, TILE.channels_last)
    out = power(window_scale(x_ptr, c, p, mask, C, P, NORM.size, alpha, k, TILE.channels_last), beta, NORM)[0]
    if grad_ptr is None:
        out *= x
    else:
        out *= load_channel(grad_ptr, c, p, mask, C, P, TILE.channels_last)
        out -= 2.0 * alpha * beta / NORM.size * x * through
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=mask)


def launch(x: Tensor, grad: Tensor | None, out: Tensor, channels_last: bool, norm: LRN) -> None:
    """Launch a kernel over dense tensors of the same (N, C, *) and layout: forward, or with a grad backward."""
    if x.numel() == 0:
        return
    images, channels, pixels = planes(x)
    size = min(norm.size, 2 * channels + 1)  # a longer window has the same sums
    formula = Formula(size, {0.75: "3/4", 0.0: "0"}.get(norm.beta, "any"), x.dtype == torch.float32)
    numbers = norm.alpha * (size / norm.size), norm.beta, norm.k
    vector = 16 // x.element_size()
    count = (vector if channels % (2 * vector) else 2 * vector) if channels_last else NCHW_COLUMNS
    whole, parts = channels % count == 0, ceil_div(channels, count)
    short = size <= (min(COLUMNS_SIZE, vector + 1) if channels_last else COLUMNS_SIZE)
    if short and not is_wide(x) and ((whole and parts <= BLOCK) or not channels_last):
        blocks_p = ceil_div(pixels, BLOCK)
        programs = ceil_div(images * pixels, BLOCK // parts) if channels_last else images * blocks_p * parts
        columns = Columns(count, parts, vector, whole, channels_last, BLOCK)
        sizes = channels, pixels, images * pixels, blocks_p
        if grad is None:
            lrn_columns_kernel[(programs,)](x, out, *sizes, *numbers, NORM=formula, COLUMNS=columns)
        else:
            lrn_columns_backward_kernel[(programs,)](x, grad, out, *sizes, *numbers, NORM=formula, COLUMNS=columns)
        return
    tiles = tiling(images, channels, pixels, channels_last, is_wide(x), elements=512)
    lrn_kernel[tiles.grid](
        x, grad, out, channels, pixels, tiles.blocks_p, tiles.blocks_c, *numbers, NORM=formula, TILE=tiles.tile
    )


def lrn(input: Tensor, *norm) -> Tensor:
    """Operator ``fastcnn::lrn.triton``."""
    x, format, channels_last = laid_out(input)
    y = torch.empty_like(x, memory_format=format)
    launch(x, None, y, channels_last, LRN(*norm))
    return y


def lrn_backward(grad: Tensor, input: Tensor, *norm) -> Tensor:
    """Operator ``fastcnn::lrn_backward.triton``."""
    x, format, channels_last = laid_out(input)
    dx = torch.empty_like(x, memory_format=format)
    launch(x, grad.contiguous(memory_format=format), dx, channels_last, LRN(*norm))
    return dx
