"""Max-pool in Triton: values and one-byte codes, optionally after adding a bias and taking the ReLU.

Layout: NCHW or NHWC, one program a tile of output pixels and channels (see tiles.py); pairs of rows and columns in NCHW
go by vectors. The backward is in max_pool_backward.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcnn.shapes import RELU_OFF, Window, memory_format
from fastcnn.triton.max_pool_backward import max_pool_backward as max_pool_backward  # an operator of this stem
from fastcnn.triton.tiles import (
    ceil_div,
    dense,
    fits_int32,
    indices,
    is_channels_last,
    is_wide,
    offset,
    pairs_up,
    row_vector,
    tile_position,
    tiling,
    vector,
    widened,
)

OFF = tl.constexpr(RELU_OFF)
UNROLLED = tl.constexpr(16)  # places of a window that are scanned without a loop


@triton.jit
def scan_place(
    x_ptr, bias, best, code, r, s, top, left, c, mask, C, H, W,
    WINDOW: tl.constexpr, HAS_BIAS: tl.constexpr, WHOLE: tl.constexpr, FIRST: tl.constexpr, CHANNELS_LAST: tl.constexpr,
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
    value = widened(x)
    if HAS_BIAS:
        # rounded as the stock bias addition rounds, so that the same pixel wins
        value = widened((value + bias).to(x.dtype))
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
def max_pool_kernel(
    x_ptr,
    bias_ptr,
    y_ptr,
    code_ptr,
    C,
    H,
    W,
    OH,
    OW,
    BLOCKS_P,
    BLOCKS_C,
    WINDOW: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RELU: tl.constexpr,
    CODES: tl.constexpr,
    WHOLE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Pool x: (N, C, H, W) to y and codes: (N, C, OH, OW); one program computes BLOCK_P outputs of BLOCK_C channels.

    Scans each window row by row. The first of equals wins; a NaN beats everything before it, as in torch. WHOLE: no
    window reaches beyond the image, nor a tile beyond the channels, so that loads need no mask.
    """
    n, block_p, block_c = tile_position(BLOCKS_P, BLOCKS_C)
    p = indices(block_p, BLOCK_P, WIDE)
    c = indices(block_c, BLOCK_C, WIDE)
    mask = (p < OH * OW)[:, None] & (c < C)[None, :]
    p_in = tl.minimum(p, OH * OW - 1)  # what is beyond the image's end computes the last pixel once more
    top = p_in // OW * WINDOW.stride[0] - WINDOW.padding[0]
    left = p_in % OW * WINDOW.stride[1] - WINDOW.padding[1]
    x_ptr += n * C * H * W
    bias = tl.load(bias_ptr + c, mask=c < C, other=0.0).to(tl.float32)[None, :] if HAS_BIAS else 0.0
    best = tl.full((BLOCK_P, BLOCK_C), float("-inf"), tl.float32)
    code = tl.full((BLOCK_P, BLOCK_C), 0 if WHOLE else -1, tl.int32)
    if WINDOW.size[0] * WINDOW.size[1] <= UNROLLED:
        for r in tl.static_range(WINDOW.size[0]):
            for s in tl.static_range(WINDOW.size[1]):
                best, code = scan_place(
                    x_ptr, bias, best, code, r, s, top, left, c, mask, C, H, W, WINDOW, HAS_BIAS, WHOLE,
                    WHOLE and r + s == 0, CHANNELS_LAST,
                )  # fmt: skip
    else:
        for r in range(WINDOW.size[0]):
            for s in range(WINDOW.size[1]):
                best, code = scan_place(
                    x_ptr, bias, best, code, r, s, top, left, c, mask, C, H, W, WINDOW, HAS_BIAS, WHOLE,
                    False, CHANNELS_LAST,
                )  # fmt: skip
    if RELU:
        off = best <= 0.0
        best = tl.where(off, 0.0, best)
        code = tl.where(off, OFF, code)
    out = n * C * OH * OW + offset(c[None, :], p[:, None], C, OH * OW, CHANNELS_LAST)
    tl.store(y_ptr + out, best.to(y_ptr.dtype.element_ty), mask=mask)
    if CODES:
        tl.store(code_ptr + out, code.to(tl.uint8), mask=mask)


@triton.jit
def max_pool_pairs_kernel(
    x_ptr,
    bias_ptr,
    y_ptr,
    code_ptr,
    ELEMENTS,
    C,
    OH,
    OW,
    HAS_BIAS: tl.constexpr,
    RELU: tl.constexpr,
    CODES: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Pool 2x2 windows side by side, x: (N, C, 2 OH, 2 OW) to y and codes: (N, C, OH, OW), NCHW.

    One program computes BLOCK vectors of outputs, each in one row of the image.
    """
    out = indices(tl.program_id(0), BLOCK, False) * VECTOR
    inside = out < ELEMENTS
    row = out // OW  # of all images and channels
    from_top = 2 * (out + row * OW)[:, None] + tl.arange(0, 2 * VECTOR)[None, :]
    top = tl.load(x_ptr + tl.multiple_of(from_top, [2, 2 * VECTOR]), mask=inside[:, None], other=0.0)
    bottom = tl.load(x_ptr + tl.multiple_of(from_top + 2 * OW, [2, 2 * VECTOR]), mask=inside[:, None], other=0.0)
    bias = 0.0
    if HAS_BIAS:
        bias = tl.load(bias_ptr + row // OH % C, mask=inside, other=0.0).to(tl.float32)[:, None]
    best = tl.full((BLOCK, VECTOR), float("-inf"), tl.float32)
    code = tl.zeros((BLOCK, VECTOR), tl.int32)
    left, right = tl.split(tl.reshape(top, (BLOCK, VECTOR, 2)))
    lower_left, lower_right = tl.split(tl.reshape(bottom, (BLOCK, VECTOR, 2)))
    places = (left, right, lower_left, lower_right)
    for i in tl.static_range(4):
        value = widened(places[i])
        if HAS_BIAS:
            # rounded as the stock bias addition rounds, so that the same pixel wins
            value = widened((value + bias).to(x_ptr.dtype.element_ty))
        wins = (value > best) | (value != value)
        best = tl.where(wins, value, best)
        code = tl.where(wins, i, code)
    if RELU:
        off = best <= 0.0
        best = tl.where(off, 0.0, best)
        code = tl.where(off, OFF, code)
    at = out[:, None] + tl.arange(0, VECTOR)[None, :]
    tl.store(y_ptr + at, best.to(y_ptr.dtype.element_ty), mask=inside[:, None])
    if CODES:
        tl.store(code_ptr + at, code.to(tl.uint8), mask=inside[:, None])


def reaches_nowhere(window: Window, height: int, width: int) -> bool:
    """Whether no window reaches beyond the image."""
    sizes = zip(window.output_size(height, width), (height, width), strict=True)
    return window.padding == (0, 0) and all(
        (out - 1) * window.stride[axis] + window.span(axis) <= size for axis, (out, size) in enumerate(sizes)
    )


def pool_pairs(x: Tensor, bias: Tensor | None, y: Tensor, code: Tensor | None, relu: bool) -> None:
    """Launch the forward kernel for 2x2 windows side by side in NCHW."""
    channels, out_height, out_width = y.shape[1:]
    size = row_vector(out_width, 16 // x.element_size())
    block = 512 // size
    max_pool_pairs_kernel[(ceil_div(y.numel(), block * size),)](
        x, vector(bias), y, code, y.numel(), channels, out_height, out_width,
        HAS_BIAS=bias is not None, RELU=relu, CODES=code is not None, VECTOR=size, BLOCK=block,
    )  # fmt: skip


def pool(input: Tensor, bias: Tensor | None, window: Window, relu: bool, codes: bool) -> tuple[Tensor, Tensor | None]:
    """Launch the forward kernel: pooled values, and codes or None."""
    x = dense(input)
    images, channels, height, width = x.shape
    out_height, out_width = window.output_size(height, width)
    channels_last = is_channels_last(input)
    y = torch.empty(
        (images, channels, out_height, out_width), dtype=x.dtype, device=x.device, memory_format=memory_format(input)
    )
    code = torch.empty_like(y, dtype=torch.uint8) if codes else None
    if y.numel() == 0:
        return y, code
    if not channels_last and pairs_up(window, height, width) and fits_int32(x):
        pool_pairs(x, bias, y, code, relu)
        return y, code
    tiles = tiling(out_height * out_width, channels, channels_last, elements=1024 if channels_last else 512)
    whole = reaches_nowhere(window, height, width) and channels % tiles.block_c == 0
    max_pool_kernel[tiles.grid(images)](
        x, vector(bias), y, code, channels, height, width, out_height, out_width, tiles.blocks_p, tiles.blocks_c,
        WINDOW=window,
        HAS_BIAS=bias is not None, RELU=relu, CODES=codes, WHOLE=whole, CHANNELS_LAST=channels_last, WIDE=is_wide(x, y),
        BLOCK_P=tiles.block_p, BLOCK_C=tiles.block_c,
    )  # fmt: skip
    return y, code


def max_pool(input: Tensor, window: Window) -> Tensor:
    """Operator ``fastcnn::max_pool.triton``."""
    return pool(input, None, window, relu=False, codes=False)[0]


def max_pool_codes(input: Tensor, window: Window) -> tuple[Tensor, Tensor | None]:
    """Operator ``fastcnn::max_pool_codes.triton``."""
    return pool(input, None, window, relu=False, codes=True)
