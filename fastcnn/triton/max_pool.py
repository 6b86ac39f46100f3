"""Max-pool in Triton: values and one-byte codes, optionally after bias or batch norm, and with the ReLU.

Layout: NCHW or NHWC, one program a tile of output pixels and channels (see tiles.py); pairs of rows and columns in NCHW
go by vectors. The backward is in max_pool_backward.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcnn.shapes import RELU_OFF, Window
from fastcnn.triton.bn_statistics import Norm, channel_numbers, normalized
from fastcnn.triton.max_pool_backward import max_pool_backward as max_pool_backward  # an operator of this stem
from fastcnn.triton.tiles import (
    ceil_div,
    first_tile,
    fits_int32,
    indices,
    is_wide,
    laid_out,
    next_tile,
    offset,
    pairs_up,
    planes,
    row_vector,
    tile_at,
    tiling,
    widened,
)

OFF = tl.constexpr(RELU_OFF)
MOST_TILES = 8  # of a program: it finds its place, and computes its channels' numbers, once
UNROLLED = tl.constexpr(16)  # places of a window that are scanned without a loop


@triton.jit
def pooled_value(x, norm, numbers):
    """Return what is pooled, in float32: x, or x after bias or batch norm, rounded as the stock layer's output is.

    Then the same pixel wins.
    """
    value = widened(x)
    if norm.mean is not None or norm.bias is not None:
        value = widened(normalized(value, numbers).to(x.dtype))
    return value


@triton.jit
def scan_place(
    x_ptr, norm, numbers, best, code, r, s, top, left, c, mask, C, H, W,
    WINDOW: tl.constexpr, WHOLE: tl.constexpr, FIRST: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """Return best and code after place (r, s) of the windows that start at top, left: [P]; see max_pool_kernel."""
    h = top + r * WINDOW.dilation[0]
    w = left + s * WINDOW.dilation[1]
    if WHOLE:
        here = mask
        x = tl.load(x_ptr + offset(c[None, :], (h * W + w)[:, None], C, H * W, CHANNELS_LAST))
    else:
        inside = (h >= 0) & (h < H) & (w >= 0) & (w < W)
        pixel = tl.where(inside, h * W + w, 0)
        here = mask & inside[:, None]
        x = tl.load(
            x_ptr + offset(c[None, :], pixel[:, None], C, H * W, CHANNELS_LAST), mask=here, other=float("-inf")
        )  # fmt: skip
    value = pooled_value(x, norm, numbers)
    if FIRST:
        best = value
    else:
        wins = (value > best) | (value != value)
        if not WHOLE:
            wins = here & (wins | (code < 0))
        best = tl.where(wins, value, best)
        code = tl.where(wins, r * WINDOW.size[1] + s, code)
    return best, code


@triton.jit
def store_winners(y_ptr, code_ptr, at, best, code, mask, RELU: tl.constexpr):
    """Store the largest values, or their ReLU, and the codes if there is a place for them."""
    if RELU:
        off = best <= 0.0
        best = tl.where(off, 0.0, best)
        code = tl.where(off, OFF, code)
    tl.store(y_ptr + at, best.to(y_ptr.dtype.element_ty), mask=mask)
    if code_ptr is not None:
        tl.store(code_ptr + at, code.to(tl.uint8), mask=mask)


@triton.jit(do_not_specialize=["TILES", "REPEAT"])
def max_pool_kernel(
    x_ptr, y_ptr, code_ptr, norm, C, H, W, OH, OW, TILES, BLOCKS_P, BLOCKS_C, REPEAT,
    WINDOW: tl.constexpr, RELU: tl.constexpr, WHOLE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Pool x: (N, C, H, W) to y and codes: (N, C, OH, OW); one program computes REPEAT of all TILES of outputs.

    Scans each window row by row. The first of equals wins; a NaN beats everything before it, as in torch. WHOLE: no
    window reaches beyond the image, nor a tile beyond the channels, so that loads need no mask.
    """
    ROWS: tl.constexpr = WINDOW.size[0]
    COLUMNS: tl.constexpr = WINDOW.size[1]
    row, image, block_p, block_c = first_tile(BLOCKS_P, BLOCKS_C, REPEAT)
    c = indices(block_c, TILE.channels, TILE.wide)
    numbers = channel_numbers(norm, c, C, 0)
    for _ in range(tl.minimum(REPEAT, TILES - row * REPEAT)):
        p, mask, out = tile_at(image, block_p, c, C, OH * OW, TILE)
        p = tl.minimum(p, OH * OW - 1)  # what is beyond the image's end computes the last pixel once more
        top = p // OW * WINDOW.stride[0] - WINDOW.padding[0]
        left = p % OW * WINDOW.stride[1] - WINDOW.padding[1]
        x_image = x_ptr + image * C * H * W
        best = tl.full((TILE.pixels, TILE.channels), float("-inf"), tl.float32)
        code = tl.full((TILE.pixels, TILE.channels), 0 if WHOLE else -1, tl.int32)
        if ROWS * COLUMNS <= UNROLLED:
            for r in tl.static_range(ROWS):
                for s in tl.static_range(COLUMNS):
                    best, code = scan_place(
                        x_image, norm, numbers, best, code, r, s, top, left, c, mask, C, H, W, WINDOW, WHOLE,
                        WHOLE and r + s == 0, TILE.channels_last,
                    )  # fmt: skip
        else:
            for r in range(ROWS):
                for s in range(COLUMNS):
                    best, code = scan_place(
                        x_image, norm, numbers, best, code, r, s, top, left, c, mask, C, H, W, WINDOW, WHOLE, False,
                        TILE.channels_last,
                    )  # fmt: skip
        store_winners(y_ptr, code_ptr, out, best, code, mask, RELU)
        image, block_p = next_tile(image, block_p, BLOCKS_P)


@triton.jit
def max_pool_pairs_kernel(
    x_ptr, y_ptr, code_ptr, norm, ELEMENTS, C, OH, OW,
    RELU: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Pool 2x2 windows side by side, x: (N, C, 2 OH, 2 OW) to y and codes: (N, C, OH, OW), NCHW.

    One program computes BLOCK vectors of outputs, each in one row of the image.
    """
    out = indices(tl.program_id(0), BLOCK, False) * VECTOR
    inside = out < ELEMENTS
    row = out // OW  # of all images and channels
    from_top = 2 * (out + row * OW)[:, None] + tl.arange(0, 2 * VECTOR)[None, :]
    top = tl.load(x_ptr + tl.multiple_of(from_top, [2, 2 * VECTOR]), mask=inside[:, None], other=0.0)
    bottom = tl.load(x_ptr + tl.multiple_of(from_top + 2 * OW, [2, 2 * VECTOR]), mask=inside[:, None], other=0.0)
    numbers = channel_numbers(norm, row // OH % C, C, 1)
    best = tl.full((BLOCK, VECTOR), float("-inf"), tl.float32)
    code = tl.zeros((BLOCK, VECTOR), tl.int32)
    left, right = tl.split(tl.reshape(top, (BLOCK, VECTOR, 2)))
    lower_left, lower_right = tl.split(tl.reshape(bottom, (BLOCK, VECTOR, 2)))
    places = (left, right, lower_left, lower_right)
    for i in tl.static_range(4):
        value = pooled_value(places[i], norm, numbers)
        wins = (value > best) | (value != value)
        best = tl.where(wins, value, best)
        code = tl.where(wins, i, code)
    store_winners(
        y_ptr, code_ptr, out[:, None] + tl.arange(0, VECTOR)[None, :], best, code, inside[:, None], RELU
    )  # fmt: skip


def pool(input: Tensor, norm: Norm, window: Window, relu: bool, codes: bool) -> tuple[Tensor, Tensor | None]:
    """Launch the forward kernel after bias or batch norm: pooled values, and codes or None."""
    x, format, channels_last = laid_out(input)
    images, channels, height, width = x.shape
    out_height, out_width = window.output_size(height, width)
    shape = (images, channels, out_height, out_width)
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=format)
    code = torch.empty_like(y, dtype=torch.uint8) if codes else None
    if y.numel() == 0:
        return y, code
    if not channels_last and pairs_up(window, height, width) and fits_int32(x):
        size = row_vector(out_width, 16 // x.element_size())
        block = 512 // size
        max_pool_pairs_kernel[(ceil_div(y.numel(), block * size),)](
            x, y, code, norm, y.numel(), channels, out_height, out_width, RELU=relu, VECTOR=size, BLOCK=block
        )
        return y, code
    elements = 1024 if channels_last else 512
    tiles = tiling(*planes(y), channels_last, is_wide(x, y), elements)
    inside = window._replace(padding=(0, 0), ceil_mode=False).output_size(height, width)  # windows within the image
    whole = window.padding == (0, 0) and inside == y.shape[2:] and channels % tiles.tile.channels == 0
    _, grid, numbers = tiles.walk(MOST_TILES)
    max_pool_kernel[grid](
        x, y, code, norm, channels, height, width, out_height, out_width, *numbers,
        WINDOW=window, RELU=relu, WHOLE=whole, TILE=tiles.tile,
    )  # fmt: skip
    return y, code


def max_pool(input: Tensor, window: Window) -> Tensor:
    """Operator ``fastcnn::max_pool.triton``."""
    return pool(input, Norm(), window, relu=False, codes=False)[0]


def max_pool_codes(input: Tensor, window: Window) -> tuple[Tensor, Tensor | None]:
    """Operator ``fastcnn::max_pool_codes.triton``."""
    return pool(input, Norm(), window, relu=False, codes=True)
