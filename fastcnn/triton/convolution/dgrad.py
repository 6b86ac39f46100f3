"""Gradient of a convolution's input in Triton: an implicit GEMM whose epilogue may mask by the ReLU before.

Layout: NCHW or NHWC for gradients and input, OIHW or OHWI for the weight.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcnn.shapes import Window
from fastcnn.triton.convolution.gradient import Source, is_wide_convolution, load_gradient, pick
from fastcnn.triton.convolution.implicit_gemm import ChannelsLast, Config, Sizes, constants, split_rows
from fastcnn.triton.tiles import added, ceil_div, laid_out, multiply_add, new_partial, offset, sum_pixels

# BLOCK_M pixels of the input by BLOCK_N of its channels, BLOCK_K of the output's channels at a time.
CONFIGS = (
    Config(128, 128, 64, 8, 3),
    Config(128, 128, 32, 8, 3),
    Config(128, 64, 64, 8, 3),
    Config(128, 64, 32, 4, 3),
    Config(64, 64, 16, 8, 3),
    Config(64, 16, 16, 4, 3),
)


@triton.jit
def dgrad_kernel(
    grad_ptr, mask_ptr, w_ptr, x_ptr, dx_ptr, partial_ptr, M, BLOCKS_N, BLOCKS_K, sizes, grad_size,
    WINDOW: tl.constexpr, POOL: tl.constexpr, LAST: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    CONFIG: tl.constexpr,
):  # fmt: skip
    """Write dx: (N, C, H, W), the gradient of the input x of a convolution with w: (OUT_C, C / groups, KH, KW).

    M = N * H * W pixels of the input; K runs over the kernel's places and, within each, the group's output channels.
    One program computes block_m pixels of block_n channels of one group. dx is zero where x <= 0, if x is given; each
    program also leaves its sum over pixels in one row of partial: (blocks of M, C), if that is wanted.
    """
    GROUP_IN, GROUP_OUT, W = sizes.group_in, sizes.group_out, sizes.width
    P = sizes.height * W
    pid = tl.program_id(0)
    block_n = pid % BLOCKS_N
    group = pid // BLOCKS_N % sizes.groups
    block_m = (pid // BLOCKS_N // sizes.groups).to(tl.int64)
    m = block_m * CONFIG.block_m + tl.arange(0, CONFIG.block_m)
    m_mask = m < M
    image, pixel = split_rows(m, m_mask, sizes.height, W, WIDE)
    h = pixel // W + WINDOW.padding[0]
    w = pixel % W + WINDOW.padding[1]
    channel = block_n * CONFIG.block_n + tl.arange(0, CONFIG.block_n)
    channel_mask = channel < GROUP_IN
    channel %= GROUP_IN  # in range, and still in runs that one load can take
    PLACES: tl.constexpr = WINDOW.size[0] * WINDOW.size[1]
    w_columns = channel if LAST.weight else channel * PLACES
    acc = tl.full((CONFIG.block_m, CONFIG.block_n), 0.0, tl.float32)
    for step in range(PLACES * BLOCKS_K):
        place = step // BLOCKS_K
        k = step % BLOCKS_K * CONFIG.block_k + tl.arange(0, CONFIG.block_k)
        k_mask = k < GROUP_OUT
        out = group * GROUP_OUT + k % GROUP_OUT
        down = h - place // WINDOW.size[1] * WINDOW.dilation[0]
        right = w - place % WINDOW.size[1] * WINDOW.dilation[1]
        oh = down // WINDOW.stride[0]
        ow = right // WINDOW.stride[1]
        inside = (down >= 0) & (oh < sizes.out_height) & (right >= 0) & (ow < sizes.out_width) & m_mask
        inside &= (oh * WINDOW.stride[0] == down) & (ow * WINDOW.stride[1] == right)
        dy = load_gradient(
            grad_ptr, mask_ptr, image, tl.where(inside, oh, 0), tl.where(inside, ow, 0),
            out.to(tl.int64) if WIDE else out, inside[:, None] & k_mask[None, :], sizes.out_channels, grad_size,
            POOL, LAST,
        )  # fmt: skip
        w_rows = w_ptr + out.to(tl.int64) * GROUP_IN * PLACES + (place * GROUP_IN if LAST.weight else place)
        weight = tl.load(w_rows[:, None] + w_columns[None, :], mask=k_mask[:, None] & channel_mask[None, :], other=0.0)
        acc = multiply_add(dy, weight, acc, PRECISION)
    channel += group * GROUP_IN
    here = m_mask[:, None] & channel_mask[None, :]
    rows = (image * sizes.channels * P)[:, None]
    columns = channel.to(tl.int64) if WIDE else channel
    if x_ptr is not None:
        x_at = rows + offset(columns[None, :], pixel[:, None], sizes.channels, P, LAST.x)
        acc = tl.where(tl.load(x_ptr + x_at, mask=here, other=0.0).to(tl.float32) <= 0.0, 0.0, acc)
    dx = acc.to(dx_ptr.dtype.element_ty)
    dx_at = rows + offset(columns[None, :], pixel[:, None], sizes.channels, P, LAST.out)
    tl.store(dx_ptr + dx_at, dx, mask=here)
    if partial_ptr is not None:
        total = sum_pixels(dx.to(tl.float32), CONFIG.block_m, CONFIG.block_n)
        tl.store(partial_ptr + block_m * sizes.channels + channel, total, mask=channel_mask)


def dgrad(
    grad: Tensor,
    mask: Tensor | None,
    input: Tensor,
    weight: Tensor,
    mask_input: bool,
    bias_grad: bool,
    config: str | None,
    window: Window,
    groups: int,
    pool: Window | None,
) -> tuple[Tensor, Tensor]:
    """Operator ``fastcnn::dgrad.triton``: the input's gradient, and its sums over pixels where `bias_grad` asks."""
    source = Source.of(grad, mask, pool)
    (x, _, x_last), (w, _, w_last) = laid_out(input), laid_out(weight)
    sizes = Sizes.of(x, w, window, groups)
    format = torch.channels_last if x_last or w_last else torch.contiguous_format
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=format)
    pixels = x.shape[0] * sizes.height * sizes.width
    wide = is_wide_convolution(source, x, x.shape[0] * sizes.out_height * sizes.out_width)
    tile = pick(CONFIGS, config, pixels, sizes.group_in, x.element_size(), wide or not source.channels_last)
    blocks_m, blocks_n = ceil_div(pixels, tile.block_m), ceil_div(sizes.group_in, tile.block_n)
    partial = new_partial(dx, blocks_m, bias_grad)
    last = ChannelsLast(x_last, w_last, x_last or w_last, source.channels_last)
    if dx.numel():
        dgrad_kernel[(blocks_m * groups * blocks_n,)](
            source.grad, source.mask, w, x if mask_input else None, dx, partial,
            pixels, blocks_n, ceil_div(sizes.group_out, tile.block_k), sizes, source.size,
            WINDOW=window, POOL=source.pool, LAST=last, **constants(tile, x.dtype, wide),
        )  # fmt: skip
    return dx, added(partial, dx)
