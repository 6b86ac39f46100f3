"""Gradient of a convolution's input in Triton: an implicit GEMM whose epilogue may mask by the ReLU before.

Layout: NCHW or NHWC for gradients and input, OIHW or OHWI for the weight.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcnn.shapes import Window, conv_memory_format
from fastcnn.triton.convolution.gradient import REGISTERS, Source, is_wide_convolution, load_gradient, pick
from fastcnn.triton.convolution.implicit_gemm import Config, conv_window, dot_precision
from fastcnn.triton.tiles import dense, is_channels_last, multiply_add, new_partial, offset, sum_pixels

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
    grad_ptr,
    mask_ptr,
    w_ptr,
    x_ptr,
    dx_ptr,
    partial_ptr,
    M,
    C,
    H,
    W,
    OUT_C,
    OH,
    OW,
    GRAD_H,
    GRAD_W,
    GROUP_IN,
    GROUP_OUT,
    BLOCKS_N,
    BLOCKS_K,
    GROUPS,
    WINDOW: tl.constexpr,
    SOURCE: tl.constexpr,
    POOL: tl.constexpr,
    MASK_INPUT: tl.constexpr,
    BIAS_GRAD: tl.constexpr,
    GRAD_CHANNELS_LAST: tl.constexpr,
    W_CHANNELS_LAST: tl.constexpr,
    X_CHANNELS_LAST: tl.constexpr,
    DX_CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Write dx: (N, C, H, W), the gradient of the input x of a convolution with w: (OUT_C, C / groups, KH, KW).

    M = N * H * W pixels of the input; K runs over the kernel's places and, within each, the group's output channels.
    One program computes BLOCK_M pixels of BLOCK_N channels of one group. With MASK_INPUT dx is zero where x <= 0; with
    BIAS_GRAD each program also leaves its sum over pixels in one row of partial: (blocks of M, C).
    """
    pid = tl.program_id(0)
    block_n = pid % BLOCKS_N
    group = pid // BLOCKS_N % GROUPS
    block_m = (pid // BLOCKS_N // GROUPS).to(tl.int64)
    m = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    m_mask = m < M
    m = tl.where(m_mask, m, 0)
    image = m // (H * W)
    pixel = m % (H * W)
    if not WIDE:
        pixel = pixel.to(tl.int32)
    h = pixel // W + WINDOW.padding[0]
    w = pixel % W + WINDOW.padding[1]
    grad_rows = (grad_ptr + image * OUT_C * GRAD_H * GRAD_W)[:, None]
    mask_rows = grad_rows
    if SOURCE != "dense":
        mask_rows = (mask_ptr + image * OUT_C * GRAD_H * GRAD_W)[:, None]
    channel = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    channel_mask = channel < GROUP_IN
    channel %= GROUP_IN  # in range, and still in runs that one load can take
    PLACES: tl.constexpr = WINDOW.size[0] * WINDOW.size[1]
    w_columns = channel if W_CHANNELS_LAST else channel * PLACES
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for step in range(PLACES * BLOCKS_K):
        place = step // BLOCKS_K
        k = step % BLOCKS_K * BLOCK_K + tl.arange(0, BLOCK_K)
        k_mask = k < GROUP_OUT
        out = group * GROUP_OUT + k % GROUP_OUT
        down = h - place // WINDOW.size[1] * WINDOW.dilation[0]
        right = w - place % WINDOW.size[1] * WINDOW.dilation[1]
        oh = down // WINDOW.stride[0]
        ow = right // WINDOW.stride[1]
        inside = (down >= 0) & (oh < OH) & (right >= 0) & (ow < OW) & m_mask
        inside &= (oh * WINDOW.stride[0] == down) & (ow * WINDOW.stride[1] == right)
        dy = load_gradient(
            grad_rows,
            mask_rows,
            tl.where(inside, oh, 0),
            tl.where(inside, ow, 0),
            out.to(tl.int64) if WIDE else out,
            inside[:, None] & k_mask[None, :],
            OUT_C,
            GRAD_H,
            GRAD_W,
            SOURCE,
            POOL,
            GRAD_CHANNELS_LAST,
        )
        w_rows = w_ptr + out.to(tl.int64) * GROUP_IN * PLACES + (place * GROUP_IN if W_CHANNELS_LAST else place)
        weight = tl.load(w_rows[:, None] + w_columns[None, :], mask=k_mask[:, None] & channel_mask[None, :], other=0.0)
        acc = multiply_add(dy, weight, acc, PRECISION)
    channel += group * GROUP_IN
    here = m_mask[:, None] & channel_mask[None, :]
    rows = (image * C * H * W)[:, None]
    columns = channel.to(tl.int64) if WIDE else channel
    if MASK_INPUT:
        x_at = rows + offset(columns[None, :], pixel[:, None], C, H * W, X_CHANNELS_LAST)
        acc = tl.where(tl.load(x_ptr + x_at, mask=here, other=0.0).to(tl.float32) <= 0.0, 0.0, acc)
    dx = acc.to(dx_ptr.dtype.element_ty)
    dx_at = rows + offset(columns[None, :], pixel[:, None], C, H * W, DX_CHANNELS_LAST)
    tl.store(dx_ptr + dx_at, dx, mask=here)
    if BIAS_GRAD:
        total = sum_pixels(dx.to(tl.float32), BLOCK_M, BLOCK_N)
        tl.store(partial_ptr + block_m * C + channel, total, mask=channel_mask)


def dgrad(
    grad: Tensor,
    mask: Tensor | None,
    input: Tensor,
    weight: Tensor,
    mask_input: bool,
    bias_grad: bool,
    config: str | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    pool: Window | None,
) -> tuple[Tensor, Tensor]:
    """Operator ``fastcnn::dgrad.triton``: the input's gradient, and its sums over pixels where `bias_grad` asks."""
    source = Source.of(grad, mask, pool)
    x, w, window = dense(input), dense(weight), conv_window(weight, stride, padding, dilation)
    images, channels, height, width = x.shape
    out_channels = w.shape[0]
    out_height, out_width = window.output_size(height, width)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=conv_memory_format(input, weight))
    pixels = images * height * width
    wide = is_wide_convolution(source, x, images * out_height * out_width)
    narrow = wide or not source.channels_last
    tile = pick(CONFIGS, config, pixels, channels // groups, x.element_size(), narrow)
    blocks_m, blocks_n = triton.cdiv(pixels, tile.block_m), triton.cdiv(channels // groups, tile.block_n)
    partial = new_partial(dx, blocks_m, bias_grad)
    if dx.numel():
        dgrad_kernel[(blocks_m * groups * blocks_n,)](
            source.grad, source.mask, w, x, dx, partial, pixels, channels, height, width,
            out_channels, out_height, out_width, source.grad.shape[2], source.grad.shape[3],
            channels // groups, out_channels // groups, blocks_n, triton.cdiv(out_channels // groups, tile.block_k),
            groups,
            WINDOW=window, SOURCE=source.kind, POOL=source.pool,
            MASK_INPUT=mask_input, BIAS_GRAD=bias_grad, GRAD_CHANNELS_LAST=source.channels_last,
            W_CHANNELS_LAST=is_channels_last(w), X_CHANNELS_LAST=is_channels_last(x),
            DX_CHANNELS_LAST=is_channels_last(dx),
            WIDE=wide, PRECISION=dot_precision(x.dtype),
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k,
            num_warps=tile.num_warps, num_stages=tile.num_stages, maxnreg=REGISTERS,
        )  # fmt: skip
    return dx, partial.sum(0).to(dx.dtype)
