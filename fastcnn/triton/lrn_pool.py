"""LRN + max-pool in Triton: the normalised values are never written; backward recomputes them.

Layout: NCHW or NHWC, one program a tile of pixels and channels (see tiles.py).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcnn.shapes import LRN, Window, memory_format
from fastcnn.triton.lrn import UNROLLED, load_channel, normalise, power, power_kind, reaching, window_scale
from fastcnn.triton.max_pool import unpool
from fastcnn.triton.tiles import dense, indices, is_channels_last, is_wide, offset, tile_position, tiling


@triton.jit
def lrn_pool_kernel(
    x_ptr,
    y_ptr,
    code_ptr,
    C,
    H,
    W,
    OH,
    OW,
    BLOCKS_P,
    BLOCKS_C,
    alpha,
    beta,
    k,
    SIZE: tl.constexpr,
    KIND: tl.constexpr,
    WINDOW: tl.constexpr,
    CODES: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Normalise x: (N, C, H, W) and pool to y and codes: (N, C, OH, OW); one program computes one tile of outputs."""
    n, block_p, block_c = tile_position(BLOCKS_P, BLOCKS_C)
    p = indices(block_p, BLOCK_P, WIDE)
    c = indices(block_c, BLOCK_C, WIDE)
    mask = (p < OH * OW)[:, None] & (c < C)[None, :]
    top = p // OW * WINDOW.stride[0] - WINDOW.padding[0]
    left = p % OW * WINDOW.stride[1] - WINDOW.padding[1]
    x_ptr += n * C * H * W
    best = tl.full((BLOCK_P, BLOCK_C), float("-inf"), tl.float32)
    code = tl.full((BLOCK_P, BLOCK_C), -1, tl.int32)
    for r in range(WINDOW.size[0]):
        for s in range(WINDOW.size[1]):
            h = top + r * WINDOW.dilation[0]
            w = left + s * WINDOW.dilation[1]
            inside = (h >= 0) & (h < H) & (w >= 0) & (w < W)
            here = mask & inside[:, None]
            pixel = tl.where(inside, h * W + w, 0)
            y = normalise(x_ptr, c, pixel, here, C, H * W, SIZE, alpha, beta, k, KIND, CHANNELS_LAST)
            # rounded as a normalised value that was written would be, so that the same pixel wins
            value = y.to(y_ptr.dtype.element_ty).to(tl.float32)
            wins = here & ((value > best) | (value != value) | (code < 0))
            best = tl.where(wins, value, best)
            code = tl.where(wins, r * WINDOW.size[1] + s, code)
    out = n * C * OH * OW + offset(c[None, :], p[:, None], C, OH * OW, CHANNELS_LAST)
    tl.store(y_ptr + out, best.to(y_ptr.dtype.element_ty), mask=mask)
    if CODES:
        tl.store(code_ptr + out, code.to(tl.uint8), mask=mask)


@triton.jit
def pooled_window_term(
    x_ptr, grad_ptr, code_ptr, c, j, h, w, p, mask, C, P, OH, OW,
    SIZE: tl.constexpr, alpha, beta, k, KIND: tl.constexpr,
    WINDOW: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """Return what lrn.window_term returns, its gradient unpooled."""
    if KIND == "0":
        return tl.zeros(mask.shape, tl.float32)
    other = c + (j - (SIZE - 1) // 2)
    exists = mask & ((other >= 0) & (other < C))[None, :]
    scale = window_scale(x_ptr, other, p, mask, C, P, SIZE, alpha, k, CHANNELS_LAST)
    grad = unpool(grad_ptr, code_ptr, h, w, other, exists, C, OH, OW, WINDOW, CHANNELS_LAST)
    x = load_channel(x_ptr, other, p, mask, C, P, CHANNELS_LAST)
    return tl.where(exists, grad * x * power(scale, beta, KIND) / scale, 0.0)


@triton.jit
def lrn_pool_backward_kernel(
    grad_ptr,
    code_ptr,
    x_ptr,
    dx_ptr,
    C,
    H,
    W,
    OH,
    OW,
    BLOCKS_P,
    BLOCKS_C,
    alpha,
    beta,
    k,
    SIZE: tl.constexpr,
    KIND: tl.constexpr,
    WINDOW: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The LRN's backward (see lrn.py), its gradient unpooled on the way: grad: (N, C, OH, OW) to dx: (N, C, H, W)."""
    n, block_p, block_c = tile_position(BLOCKS_P, BLOCKS_C)
    p = indices(block_p, BLOCK_P, WIDE)
    c = indices(block_c, BLOCK_C, WIDE)
    P = H * W
    mask = (p < P)[:, None] & (c < C)[None, :]
    x_ptr += n * C * P
    grad_ptr += n * C * OH * OW
    code_ptr += n * C * OH * OW
    through = tl.zeros(mask.shape, tl.float32)
    if SIZE <= UNROLLED:
        for j in tl.static_range(SIZE):
            through += pooled_window_term(
                x_ptr, grad_ptr, code_ptr, c, j, p // W, p % W, p, mask, C, P, OH, OW, SIZE, alpha, beta, k, KIND,
                WINDOW, CHANNELS_LAST,
            )  # fmt: skip
    else:
        for j in range(SIZE):
            through += pooled_window_term(
                x_ptr, grad_ptr, code_ptr, c, j, p // W, p % W, p, mask, C, P, OH, OW, SIZE, alpha, beta, k, KIND,
                WINDOW, CHANNELS_LAST,
            )  # fmt: skip
    x = load_channel(x_ptr, c, p, mask, C, P, CHANNELS_LAST)
    grad = unpool(
        grad_ptr, code_ptr, p // W, p % W, c, mask, C, OH, OW, WINDOW, CHANNELS_LAST
    )  # fmt: skip
    scale = window_scale(x_ptr, c, p, mask, C, P, SIZE, alpha, k, CHANNELS_LAST)
    dx = grad * power(scale, beta, KIND) - 2.0 * alpha * beta / SIZE * x * through
    at = n * C * P + offset(c[None, :], p[:, None], C, P, CHANNELS_LAST)
    tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=mask)


def _forward(input: Tensor, norm: LRN, window: Window, codes: bool) -> tuple[Tensor, Tensor | None]:
    x = dense(input)
    images, channels, height, width = x.shape
    norm = reaching(norm, channels)
    out_height, out_width = window.output_size(height, width)
    channels_last = is_channels_last(input)
    shape = (images, channels, out_height, out_width)
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format(input))
    code = torch.empty_like(y, dtype=torch.uint8) if codes else None
    if y.numel():
        tiles = tiling(out_height * out_width, channels, channels_last, elements=256)
        lrn_pool_kernel[tiles.grid(images)](
            x, y, code, channels, height, width, out_height, out_width, tiles.blocks_p, tiles.blocks_c,
            norm.alpha, norm.beta, norm.k, SIZE=norm.size, KIND=power_kind(norm.beta), WINDOW=window,
            CODES=codes, CHANNELS_LAST=channels_last, WIDE=is_wide(x, y), BLOCK_P=tiles.block_p, BLOCK_C=tiles.block_c,
        )  # fmt: skip
    return y, code


def lrn_pool(input: Tensor, size: int, alpha: float, beta: float, k: float, window: Window) -> Tensor:
    """Operator ``fastcnn::lrn_pool.triton``."""
    return _forward(input, LRN(size, alpha, beta, k), window, codes=False)[0]


def lrn_pool_codes(
    input: Tensor, size: int, alpha: float, beta: float, k: float, window: Window
) -> tuple[Tensor, Tensor | None]:
    """Operator ``fastcnn::lrn_pool_codes.triton``."""
    return _forward(input, LRN(size, alpha, beta, k), window, codes=True)


def lrn_pool_backward(
    grad: Tensor, codes: Tensor, input: Tensor, size: int, alpha: float, beta: float, k: float, window: Window
) -> Tensor:
    """Operator ``fastcnn::lrn_pool_backward.triton``."""
    norm = reaching(LRN(size, alpha, beta, k), input.shape[1])
    format = memory_format(input)
    x = dense(input)
    images, channels, height, width = x.shape
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=format)
    channels_last = is_channels_last(input)
    if dx.numel():
        tiles = tiling(height * width, channels, channels_last, elements=256)
        lrn_pool_backward_kernel[tiles.grid(images)](
            grad.contiguous(memory_format=format), codes.contiguous(memory_format=format), x, dx,
            channels, height, width, codes.shape[2], codes.shape[3], tiles.blocks_p, tiles.blocks_c,
            norm.alpha, beta, k, SIZE=norm.size, KIND=power_kind(beta), WINDOW=window,
            CHANNELS_LAST=channels_last, WIDE=is_wide(x), BLOCK_P=tiles.block_p, BLOCK_C=tiles.block_c,
        )  # fmt: skip
    return dx
