"""The gradient of what a max-pool or a ReLU reads in Triton, optionally with the bias gradient of the layer before.

Layout: NCHW or NHWC. Windows whose stride is at most two go by quads: the pixels between two windows' starts, which
read each window's gradient once. Other windows are gathered pixel by pixel; 2x2 windows in NCHW go by vectors.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcnn.shapes import RELU_OFF, Window
from fastcnn.triton.tiles import (
    added,
    ceil_div,
    indices,
    is_wide,
    laid_out,
    new_partial,
    offset,
    pairs_up,
    row_vector,
    sum_pixels,
    tile_at,
    tile_position,
    tiling,
    widened,
)

REPEAT = 8  # tiles or blocks that one program sums for a bias gradient: fewer partial sums to add up
OFF = tl.constexpr(RELU_OFF)


@triton.jit
def unpool(grad_ptr, code_ptr, h, w, c, mask, C, OH, OW, WINDOW: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Gather the pooled gradients whose windows chose input pixel (h, w): h, w: [P], c: [C], mask: [P, C].

    Looks at each window that covers the pixel, the last one first; returns float32 [P, C]. Pointers are the image's.
    """
    DOWN: tl.constexpr = WINDOW.dilation[0] * (WINDOW.size[0] - 1)  # from a window's first pixel to its last
    RIGHT: tl.constexpr = WINDOW.dilation[1] * (WINDOW.size[1] - 1)
    ROWS: tl.constexpr = DOWN // WINDOW.stride[0] + 1
    COLUMNS: tl.constexpr = RIGHT // WINDOW.stride[1] + 1
    total = tl.zeros(mask.shape, tl.float32)
    for i in range(ROWS):
        for j in range(COLUMNS):
            oh = (h + WINDOW.padding[0]) // WINDOW.stride[0] - i
            ow = (w + WINDOW.padding[1]) // WINDOW.stride[1] - j
            down = h + WINDOW.padding[0] - oh * WINDOW.stride[0]
            right = w + WINDOW.padding[1] - ow * WINDOW.stride[1]
            covers = (oh >= 0) & (oh < OH) & (down <= DOWN) & (down % WINDOW.dilation[0] == 0)
            covers &= (ow >= 0) & (ow < OW) & (right <= RIGHT) & (right % WINDOW.dilation[1] == 0)
            place = down // WINDOW.dilation[0] * WINDOW.size[1] + right // WINDOW.dilation[1]
            here = mask & covers[:, None]
            pixel = tl.where(covers, oh * OW + ow, 0)
            at = offset(c[None, :], pixel[:, None], C, OH * OW, CHANNELS_LAST)
            code = tl.load(code_ptr + at, mask=here, other=OFF).to(tl.int32)
            grad = tl.load(grad_ptr + at, mask=here, other=0.0).to(tl.float32)
            total += tl.where(here & (code == place[:, None]), grad, 0.0)
    return total


@triton.jit(do_not_specialize=["REPEAT"])
def masked_gradient_kernel(
    grad_ptr, mask_ptr, dx_ptr, partial_ptr, C, H, W, OH, OW, BLOCKS_P, BLOCKS_C, REPEAT, scale,
    WINDOW: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Write dx: (N, C, H, W): grad where the ReLU's output is positive, times scale; or unpooled by a WINDOW's codes.

    One program computes REPEAT tiles of pixels of an image.
    """
    n, block_p, block_c = tile_position(BLOCKS_P, BLOCKS_C)
    c = indices(block_c, TILE.channels, TILE.wide)
    grad_ptr += n * C * OH * OW
    mask_ptr += n * C * OH * OW
    dx_ptr += n * C * H * W
    sums = tl.full((TILE.pixels, TILE.channels), 0.0, tl.float32)
    for i in range(REPEAT):
        p, mask, at = tile_at(0, block_p * REPEAT + i, c, C, H * W, TILE)
        if WINDOW is None:
            y = tl.load(mask_ptr + at, mask=mask, other=0.0).to(tl.float32)
            grad = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
            dx = tl.where(y <= 0.0, 0.0, grad * scale)
        else:
            dx = unpool(grad_ptr, mask_ptr, p // W, p % W, c, mask, C, OH, OW, WINDOW, TILE.channels_last)
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if partial_ptr is not None:
            sums += dx
    store_sums(partial_ptr, sums, n * BLOCKS_P + block_p, c, C, TILE)


@triton.jit
def store_sums(partial_ptr, sums, row, c, C, TILE: tl.constexpr):
    """Store what a program has summed up, over the pixels of a tile, in one row of partial: (rows, C), if wanted."""
    if partial_ptr is not None:
        tl.store(partial_ptr + row * C + c, sum_pixels(sums, TILE.pixels, TILE.channels), mask=c < C)


@triton.jit
def load_window(
    grad_ptr, code_ptr, oh, ow, c, mask, C, OH, OW, UP: tl.constexpr, LEFT: tl.constexpr, CHANNELS_LAST: tl.constexpr
):  # fmt: skip
    """Load gradient and code of windows (oh - UP, ow - LEFT): oh, ow: [P], c: [C]; zero and none outside."""
    exists = (oh >= UP) & (oh - UP < OH) & (ow >= LEFT) & (ow - LEFT < OW)
    pixel = tl.where(exists, (oh - UP) * OW + (ow - LEFT), 0)
    here = mask & exists[:, None]
    at = offset(c[None, :], pixel[:, None], C, OH * OW, CHANNELS_LAST)
    grad = widened(tl.load(grad_ptr + at, mask=here, other=0.0))
    return grad, tl.load(code_ptr + at, mask=here, other=OFF).to(tl.int32)


@triton.jit(do_not_specialize=["REPEAT"])
def unpool_quads_kernel(
    grad_ptr, code_ptr, dx_ptr, partial_ptr, C, H, W, OH, OW, BLOCKS_P, BLOCKS_C, REPEAT, QUAD_ROWS, QUAD_COLUMNS,
    WINDOW: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Unpool grad: (N, C, OH, OW) to dx: (N, C, H, W); one program computes REPEAT tiles of quads.

    Quad (q, r) starts at the first pixel of window (q, r) and holds the pixels up to the next window's. Windows that
    reach into it are its own and those before it, which no stride may leave more of than two along an axis.
    """
    DOWN: tl.constexpr = WINDOW.stride[0]
    RIGHT: tl.constexpr = WINDOW.stride[1]
    ROWS: tl.constexpr = WINDOW.size[0]
    COLUMNS: tl.constexpr = WINDOW.size[1]
    n, block_p, block_c = tile_position(BLOCKS_P, BLOCKS_C)
    c = indices(block_c, TILE.channels, False)
    grad_ptr += n * C * OH * OW
    code_ptr += n * C * OH * OW
    dx_ptr += n * C * H * W
    sums = tl.full((TILE.pixels, TILE.channels), 0.0, tl.float32)
    for i in range(REPEAT):
        quad = indices(block_p * REPEAT + i, TILE.pixels, False)
        mask = (quad < QUAD_ROWS * QUAD_COLUMNS)[:, None] & (c < C)[None, :]
        row, column = quad // QUAD_COLUMNS, quad % QUAD_COLUMNS
        windows = ()
        for k in tl.static_range(4):  # its own, the one before, those of the row before
            here = mask & ((k < 2 or ROWS > DOWN) and (k % 2 == 0 or COLUMNS > RIGHT))
            windows = windows + (
                load_window(grad_ptr, code_ptr, row, column, c, here, C, OH, OW, k // 2, k % 2, TILE.channels_last),
            )
        for a in tl.static_range(DOWN):
            for b in tl.static_range(RIGHT):
                if a < ROWS and b < COLUMNS:
                    total = tl.where(windows[0][1] == a * COLUMNS + b, windows[0][0], 0.0)  # type: ignore[misc]
                else:  # between windows
                    total = tl.zeros_like(windows[0][0])  # type: ignore[misc]
                for k in tl.static_range(1, 4):
                    if a + k // 2 * DOWN < ROWS and b + k % 2 * RIGHT < COLUMNS:
                        place = (a + k // 2 * DOWN) * COLUMNS + b + k % 2 * RIGHT
                        total += tl.where(windows[k][1] == place, windows[k][0], 0.0)
                h = row * DOWN + (a - WINDOW.padding[0])
                w = column * RIGHT + (b - WINDOW.padding[1])
                here = mask & ((h >= 0) & (h < H) & (w >= 0) & (w < W))[:, None]
                dx = total.to(dx_ptr.dtype.element_ty)
                tl.store(dx_ptr + offset(c[None, :], (h * W + w)[:, None], C, H * W, TILE.channels_last), dx, mask=here)
                if partial_ptr is not None:
                    sums += total  # zero outside the image, where no window's winner is
    store_sums(partial_ptr, sums, n * BLOCKS_P + block_p, c, C, TILE)


@triton.jit(do_not_specialize=["REPEAT"])
def unpool_pairs_kernel(
    grad_ptr, code_ptr, dx_ptr, partial_ptr, C, VECTORS, OW, BLOCKS, REPEAT, VECTOR: tl.constexpr, BLOCK: tl.constexpr
):
    """Unpool 2x2 windows side by side, grad: (N, C, OH, OW) to dx: (N, C, 2 OH, 2 OW), NCHW.

    One program computes REPEAT blocks of the VECTORS of a plane's windows, each in one row.
    """
    plane = tl.program_id(0) // BLOCKS
    block = tl.program_id(0) % BLOCKS
    base = plane.to(tl.int64) * (VECTORS * VECTOR)
    grad_ptr += base
    code_ptr += base
    dx_ptr += 4 * base
    partial = tl.zeros((BLOCK,), tl.float32)
    for i in range(REPEAT):
        v = indices(block * REPEAT + i, BLOCK, False)
        inside = (v < VECTORS)[:, None]
        at = (v * VECTOR)[:, None] + tl.arange(0, VECTOR)[None, :]
        grad = tl.load(grad_ptr + at, mask=inside, other=0.0)
        code = tl.load(code_ptr + at, mask=inside, other=OFF).to(tl.int32)
        first = 2 * (v * VECTOR + v * VECTOR // OW * OW)[:, None] + tl.arange(0, 2 * VECTOR)[None, :]
        first = tl.multiple_of(first, [2, 2 * VECTOR])
        zero = tl.zeros_like(grad)
        top = tl.join(tl.where(code == 0, grad, zero), tl.where(code == 1, grad, zero))
        bottom = tl.join(tl.where(code == 2, grad, zero), tl.where(code == 3, grad, zero))
        tl.store(dx_ptr + first, tl.reshape(top, (BLOCK, 2 * VECTOR)), mask=inside)
        tl.store(dx_ptr + (first + 2 * OW), tl.reshape(bottom, (BLOCK, 2 * VECTOR)), mask=inside)
        if partial_ptr is not None:
            partial += tl.sum(tl.where(code < 4, grad.to(tl.float32), 0.0), axis=1)
    if partial_ptr is not None:
        image = plane // C
        tl.store(partial_ptr + (image * BLOCKS + block) * C + plane % C, tl.sum(partial, axis=0))


def by_tiles(
    grad: Tensor, mask: Tensor, dx: Tensor, bias_grad: bool, window: Window | None = None, scale: float = 1.0
) -> Tensor:
    """Launch a kernel by tiles of pixels or quads into dx, in one layout with gradient and mask; return the bias's."""
    images, channels, height, width = dx.shape
    channels_last, wide = dx.stride(1) == 1, is_wide(dx, mask)
    kernel, rows, columns, last = masked_gradient_kernel, height, width, [scale]
    elements = 1024 if channels_last or window is None else 512
    if window is not None and reads_four(window) and not wide:
        rows, columns = last = [
            (size - 1 + padding) // stride + 1
            for size, padding, stride in zip((height, width), window.padding, window.stride, strict=True)
        ]
        kernel, elements = unpool_quads_kernel, 1024 if channels_last else 128
    tiles = tiling(images, channels, rows * columns, channels_last, wide, elements)
    repeat = min(tiles.blocks_p, REPEAT)
    tiles = tiles._replace(blocks_p=ceil_div(tiles.blocks_p, repeat))
    partial = new_partial(dx, images * tiles.blocks_p, bias_grad)
    if dx.numel():
        kernel[tiles.grid](
            grad, mask, dx, partial, channels, height, width, *mask.shape[2:],
            tiles.blocks_p, tiles.blocks_c, repeat, *last, WINDOW=window, TILE=tiles.tile,
        )  # fmt: skip
    return added(partial, dx)


def by_vectors(
    kernel: Any, grad: Tensor, mask: Tensor, dx: Tensor, bias_grad: bool, size: int, vectors: int, *numbers, **constants
) -> Tensor:
    """Launch a kernel over the vectors of NCHW's planes, one a thread, into dx; return the bias gradient."""
    planes = dx.shape[0] * dx.shape[1]
    warps = 4 if vectors >= 512 else 1
    blocks = ceil_div(vectors, 32 * warps)
    repeat = min(blocks, REPEAT)
    programs = ceil_div(blocks, repeat)
    partial = new_partial(dx, dx.shape[0] * programs, bias_grad)
    if dx.numel():
        kernel[(planes * programs,)](
            grad, mask, dx, partial, dx.shape[1], *numbers, programs, repeat,
            VECTOR=size, BLOCK=32 * warps, num_warps=warps, **constants,
        )  # fmt: skip
    return added(partial, dx)


def pool_backward(
    grad: Tensor, codes: Tensor, height: int, width: int, window: Window, bias_grad: bool
) -> tuple[Tensor, Tensor]:
    """Launch the backward kernel: the gradients of the pool's input and of the bias (without elements if not asked)."""
    codes, format, channels_last = laid_out(codes)
    images, channels, out_height, out_width = codes.shape
    dx = torch.empty((images, channels, height, width), dtype=grad.dtype, device=grad.device, memory_format=format)
    grad = grad.contiguous(memory_format=format)
    if channels_last or not pairs_up(window, height, width) or is_wide(dx, codes):
        return dx, by_tiles(grad, codes, dx, bias_grad, window)
    size = row_vector(out_width, max(8 // grad.element_size(), 2))
    vectors = out_height * out_width // size
    return dx, by_vectors(unpool_pairs_kernel, grad, codes, dx, bias_grad, size, vectors, vectors, out_width)


def reads_four(window: Window) -> bool:
    """Whether no pixel lies in more than two windows along an axis, and no window has gaps."""
    sizes = zip(window.size, window.stride, strict=True)
    return window.dilation == (1, 1) and all(size <= 2 * stride and stride <= 2 for size, stride in sizes)


def max_pool_backward(grad: Tensor, codes: Tensor, height: int, width: int, window: Window) -> Tensor:
    """Operator ``fastcnn::max_pool_backward.triton``."""
    return pool_backward(grad, codes, height, width, window, bias_grad=False)[0]
