"""Batch norm + ReLU + max-pool in Triton: the normalized values are never written; backward is bn_relu's, unpooling.

Layout: NCHW or NHWC, one program a tile of output pixels and channels (see tiles.py).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcnn.shapes import Window, memory_format
from fastcnn.triton.bn_relu import Norm, backward, channel_numbers
from fastcnn.triton.max_pool import OFF
from fastcnn.triton.tiles import dense, indices, is_channels_last, is_wide, offset, tile_position, tiling


@triton.jit
def bn_relu_pool_kernel(
    x_ptr,
    y_ptr,
    code_ptr,
    mean_ptr,
    variance_ptr,
    weight_ptr,
    bias_ptr,
    eps,
    C,
    H,
    W,
    OH,
    OW,
    BLOCKS_P,
    BLOCKS_C,
    WINDOW: tl.constexpr,
    CODES: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Normalize x: (N, C, H, W) and pool to y and codes: (N, C, OH, OW); one program computes one tile of outputs."""
    n, block_p, block_c = tile_position(BLOCKS_P, BLOCKS_C)
    p = indices(block_p, BLOCK_P, WIDE)
    c = indices(block_c, BLOCK_C, WIDE)
    mask = (p < OH * OW)[:, None] & (c < C)[None, :]
    mean, inverse, weight, bias = channel_numbers(
        mean_ptr, variance_ptr, weight_ptr, bias_ptr, c, C, eps, HAS_WEIGHT, HAS_BIAS
    )
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
            pixel = tl.where(inside, h * W + w, 0)
            here = mask & inside[:, None]
            x = tl.load(x_ptr + offset(c[None, :], pixel[:, None], C, H * W, CHANNELS_LAST), mask=here, other=0.0)
            value = (x.to(tl.float32) - mean) * (inverse * weight) + bias
            # rounded like a stored normalized value, so that the same pixel wins
            value = value.to(y_ptr.dtype.element_ty).to(tl.float32)
            wins = here & ((value > best) | (value != value) | (code < 0))
            best = tl.where(wins, value, best)
            code = tl.where(wins, r * WINDOW.size[1] + s, code)
    off = best <= 0.0
    out = n * C * OH * OW + offset(c[None, :], p[:, None], C, OH * OW, CHANNELS_LAST)
    tl.store(y_ptr + out, tl.where(off, 0.0, best).to(y_ptr.dtype.element_ty), mask=mask)
    if CODES:
        tl.store(code_ptr + out, tl.where(off, OFF, code).to(tl.uint8), mask=mask)


def _forward(input: Tensor, norm: Norm, window: Window, codes: bool) -> tuple[Tensor, Tensor | None]:
    x = dense(input)
    images, channels, height, width = x.shape
    out_height, out_width = window.output_size(height, width)
    channels_last = is_channels_last(input)
    shape = (images, channels, out_height, out_width)
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format(input))
    code = torch.empty_like(y, dtype=torch.uint8) if codes else None
    if y.numel() == 0:
        return y, code
    tiles = tiling(out_height * out_width, channels, channels_last, elements=1024 if channels_last else 512)
    bn_relu_pool_kernel[tiles.grid(images)](
        x, y, code, *norm, channels, height, width, out_height, out_width, tiles.blocks_p, tiles.blocks_c,
        WINDOW=window, CODES=codes, **norm.flags(),
        CHANNELS_LAST=channels_last, WIDE=is_wide(x, y), BLOCK_P=tiles.block_p, BLOCK_C=tiles.block_c,
    )  # fmt: skip
    return y, code


def bn_relu_pool(input: Tensor, *settings) -> Tensor:
    """Operator ``fastcnn::bn_relu_pool.triton``."""
    *numbers, window = settings
    return _forward(input, Norm.of(*numbers), window, codes=False)[0]


def bn_relu_pool_codes(input: Tensor, *settings) -> tuple[Tensor, Tensor | None]:
    """Operator ``fastcnn::bn_relu_pool_codes.triton``."""
    *numbers, window = settings
    return _forward(input, Norm.of(*numbers), window, codes=True)


def bn_relu_pool_backward(grad: Tensor, codes: Tensor, input: Tensor, *settings) -> tuple[Tensor, Tensor, Tensor]:
    """Operator ``fastcnn::bn_relu_pool_backward.triton``: the codes hold the ReLU's mask too."""
    *numbers, training, window = settings
    codes = codes.contiguous(memory_format=memory_format(input))
    return backward(grad, codes, input, Norm.of(*numbers), training, window)
