"""Max-pool in Triton: values, one-byte codes, and a gather-based backward; with bias and ReLU on the way if asked.

Layout: NCHW or NHWC, one program a tile of output pixels and channels (see tiles.py).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcnn.shapes import RELU_OFF, Window, memory_format
from fastcnn.triton.tiles import (
    REPEAT,
    dense,
    indices,
    is_channels_last,
    is_wide,
    new_partial,
    offset,
    sum_pixels,
    tile_position,
    tiling,
    vector,
)

OFF = tl.constexpr(RELU_OFF)


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
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Pool x: (N, C, H, W) to y and codes: (N, C, OH, OW); one program computes BLOCK_P outputs of BLOCK_C channels.

    Scans each window row by row. The first of equals wins; a NaN beats everything before it, as in torch.
    """
    n, block_p, block_c = tile_position(BLOCKS_P, BLOCKS_C)
    p = indices(block_p, BLOCK_P, WIDE)
    c = indices(block_c, BLOCK_C, WIDE)
    mask = (p < OH * OW)[:, None] & (c < C)[None, :]
    top = p // OW * WINDOW.stride[0] - WINDOW.padding[0]
    left = p % OW * WINDOW.stride[1] - WINDOW.padding[1]
    x_ptr += n * C * H * W
    if HAS_BIAS:
        bias = tl.load(bias_ptr + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    best = tl.full((BLOCK_P, BLOCK_C), float("-inf"), tl.float32)
    code = tl.full((BLOCK_P, BLOCK_C), -1, tl.int32)
    for r in range(WINDOW.size[0]):
        for s in range(WINDOW.size[1]):
            h = top + r * WINDOW.dilation[0]
            w = left + s * WINDOW.dilation[1]
            inside = (h >= 0) & (h < H) & (w >= 0) & (w < W)
            pixel = tl.where(inside, h * W + w, 0)
            here = mask & inside[:, None]
            at = offset(c[None, :], pixel[:, None], C, H * W, CHANNELS_LAST)
            x = tl.load(x_ptr + at, mask=here, other=float("-inf"))
            value = x.to(tl.float32)
            if HAS_BIAS:
                # rounded as the stock bias addition rounds, so that the same pixel wins
                value = (value + bias).to(x.dtype).to(tl.float32)
            wins = here & ((value > best) | (value != value) | (code < 0))
            best = tl.where(wins, value, best)
            code = tl.where(wins, r * WINDOW.size[1] + s, code)
    if RELU:
        off = best <= 0.0
        best = tl.where(off, 0.0, best)
        code = tl.where(off, OFF, code)
    out = n * C * OH * OW + offset(c[None, :], p[:, None], C, OH * OW, CHANNELS_LAST)
    tl.store(y_ptr + out, best.to(y_ptr.dtype.element_ty), mask=mask)
    if CODES:
        tl.store(code_ptr + out, code.to(tl.uint8), mask=mask)


@triton.jit
def unpool(
    grad_ptr,
    code_ptr,
    h,
    w,
    c,
    mask,
    C,
    OH,
    OW,
    WINDOW: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
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


@triton.jit
def max_pool_backward_kernel(
    grad_ptr,
    code_ptr,
    dx_ptr,
    partial_ptr,
    C,
    H,
    W,
    OH,
    OW,
    BLOCKS_P,
    BLOCKS_C,
    WINDOW: tl.constexpr,
    BIAS_GRAD: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    REPEAT: tl.constexpr,
):
    """Unpool grad: (N, C, OH, OW) to dx: (N, C, H, W); one program computes REPEAT blocks of BLOCK_P pixels.

    With BIAS_GRAD each program also leaves its sum over pixels in one row of partial: (programs a channel, C).
    """
    n, block_p, block_c = tile_position(BLOCKS_P, BLOCKS_C)
    c = indices(block_c, BLOCK_C, WIDE)
    grad_ptr += n * C * OH * OW
    code_ptr += n * C * OH * OW
    dx_ptr += n * C * H * W
    partial = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for i in range(REPEAT):
        p = indices(block_p * REPEAT + i, BLOCK_P, WIDE)
        mask = (p < H * W)[:, None] & (c < C)[None, :]
        dx = unpool(grad_ptr, code_ptr, p // W, p % W, c, mask, C, OH, OW, WINDOW, CHANNELS_LAST).to(
            dx_ptr.dtype.element_ty
        )
        tl.store(dx_ptr + offset(c[None, :], p[:, None], C, H * W, CHANNELS_LAST), dx, mask=mask)
        if BIAS_GRAD:
            partial += dx.to(tl.float32)
    if BIAS_GRAD:
        total = sum_pixels(partial, BLOCK_P, BLOCK_C)
        tl.store(partial_ptr + (n * BLOCKS_P + block_p) * C + c, total, mask=c < C)


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
    tiles = tiling(out_height * out_width, channels, channels_last, elements=1024 if channels_last else 512)
    max_pool_kernel[tiles.grid(images)](
        x, vector(bias), y, code, channels, height, width, out_height, out_width, tiles.blocks_p, tiles.blocks_c,
        WINDOW=window,
        HAS_BIAS=bias is not None, RELU=relu, CODES=codes, CHANNELS_LAST=channels_last, WIDE=is_wide(x, y),
        BLOCK_P=tiles.block_p, BLOCK_C=tiles.block_c,
    )  # fmt: skip
    return y, code


def pool_backward(
    grad: Tensor, codes: Tensor, height: int, width: int, window: Window, bias_grad: bool
) -> tuple[Tensor, Tensor]:
    """Launch the backward kernel: the gradients of the pool's input and of the bias (without elements if not asked)."""
    codes, format = dense(codes), memory_format(codes)
    images, channels, out_height, out_width = codes.shape
    channels_last = is_channels_last(codes)
    dx = torch.empty((images, channels, height, width), dtype=grad.dtype, device=grad.device, memory_format=format)
    repeat = REPEAT if bias_grad else 1
    tiles = tiling(height * width, channels, channels_last, elements=1024 if channels_last else 512, repeat=repeat)
    partial = new_partial(dx, images * tiles.blocks_p, bias_grad)
    if dx.numel():
        max_pool_backward_kernel[tiles.grid(images)](
            grad.contiguous(memory_format=format), codes, dx, partial,
            channels, height, width, out_height, out_width, tiles.blocks_p, tiles.blocks_c,
            WINDOW=window,
            BIAS_GRAD=bias_grad, CHANNELS_LAST=channels_last, WIDE=is_wide(dx, codes),
            BLOCK_P=tiles.block_p, BLOCK_C=tiles.block_c, REPEAT=repeat,
        )  # fmt: skip
    return dx, partial.sum(0).to(dx.dtype)


def max_pool(input: Tensor, window: Window) -> Tensor:
    """Operator ``fastcnn::max_pool.triton``."""
    return pool(input, None, window, relu=False, codes=False)[0]


def max_pool_codes(input: Tensor, window: Window) -> tuple[Tensor, Tensor | None]:
    """Operator ``fastcnn::max_pool_codes.triton``."""
    return pool(input, None, window, relu=False, codes=True)


def max_pool_backward(grad: Tensor, codes: Tensor, height: int, width: int, window: Window) -> Tensor:
    """Operator ``fastcnn::max_pool_backward.triton``."""
    return pool_backward(grad, codes, height, width, window, bias_grad=False)[0]
