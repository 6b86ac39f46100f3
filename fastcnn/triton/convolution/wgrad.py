"""Gradient of a convolution's weight in Triton, and of its bias on the way: products over pixels, in parts.

Layout: NCHW or NHWC for gradient and input, OIHW or OHWI for the weight's gradient.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcnn.shapes import Window, conv_memory_format
from fastcnn.triton.convolution.gradient import REGISTERS, Source, is_wide_convolution, load_gradient, pick
from fastcnn.triton.convolution.implicit_gemm import Config, conv_window, dot_precision
from fastcnn.triton.tiles import dense, is_channels_last, multiply_add, sum_pixels

# BLOCK_M output channels by BLOCK_N columns of the weight, BLOCK_K pixels at a time.
CONFIGS = (
    Config(128, 128, 64, 8, 3),
    Config(128, 128, 32, 8, 3),
    Config(64, 128, 64, 8, 3),
    Config(64, 128, 32, 8, 3),
    Config(64, 64, 16, 8, 3),
    Config(64, 16, 16, 4, 3),
)
PROGRAMS = 264  # two for each multiprocessor of an H200: the pixels are split until there are so many
LEAST_STEPS = 8  # blocks of pixels that a program multiplies at least, so that the partial sums stay few


@triton.jit
def wgrad_kernel(
    grad_ptr,
    mask_ptr,
    x_ptr,
    partial_ptr,
    bias_ptr,
    P,
    SPLIT,
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
    BLOCKS_M,
    BLOCKS_N,
    GROUPS,
    WINDOW: tl.constexpr,
    SOURCE: tl.constexpr,
    POOL: tl.constexpr,
    BIAS_GRAD: tl.constexpr,
    GRAD_CHANNELS_LAST: tl.constexpr,
    X_CHANNELS_LAST: tl.constexpr,
    W_CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Write partial: (splits, OUT_C, K), the weight's gradient by parts of P = N * OH * OW pixels of the output.

    K runs over the kernel's places and the group's input channels, in the weight's memory order. One program sums
    SPLIT pixels of BLOCK_M output channels by BLOCK_N of K. With BIAS_GRAD there is one more block of K, whose program
    sums the gradient itself into bias: (splits, OUT_C).
    """
    pid = tl.program_id(0)
    COLUMNS = BLOCKS_N + BIAS_GRAD
    block_n = pid % COLUMNS
    block_m = pid // COLUMNS % BLOCKS_M
    group = pid // COLUMNS // BLOCKS_M % GROUPS
    split = (pid // COLUMNS // BLOCKS_M // GROUPS).to(tl.int64)
    out = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    out_mask = out < GROUP_OUT
    out = group * GROUP_OUT + out % GROUP_OUT  # in range, and still in runs that one load can take
    out_at = out.to(tl.int64) if WIDE else out
    first = split * SPLIT
    last = tl.minimum(first + SPLIT, P)
    if not WIDE:
        first, last = first.to(tl.int32), last.to(tl.int32)
    if BIAS_GRAD and block_n == BLOCKS_N:
        sums = tl.zeros((BLOCK_K, BLOCK_M), dtype=tl.float32)
        for p0 in range(first, last, BLOCK_K):
            p = p0 + tl.arange(0, BLOCK_K)
            p_mask = p < last
            p = tl.where(p_mask, p, first)
            image = (p // (OH * OW)).to(tl.int64) * OUT_C * GRAD_H * GRAD_W
            pixel = p % (OH * OW)
            sums += load_gradient(
                (grad_ptr + image)[:, None],
                (grad_ptr if SOURCE == "dense" else mask_ptr) + image[:, None],
                pixel // OW,
                pixel % OW,
                out_at,
                p_mask[:, None] & out_mask[None, :],
                OUT_C,
                GRAD_H,
                GRAD_W,
                SOURCE,
                POOL,
                GRAD_CHANNELS_LAST,
            ).to(tl.float32)
        tl.store(bias_ptr + split * OUT_C + out, sum_pixels(sums, BLOCK_K, BLOCK_M), mask=out_mask)
    else:
        PLACES: tl.constexpr = WINDOW.size[0] * WINDOW.size[1]
        K = GROUP_IN * PLACES
        k = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
        k_mask = k < K
        if W_CHANNELS_LAST:
            channel = k % GROUP_IN
            place = tl.where(k_mask, k // GROUP_IN, 0)
        else:
            channel = tl.where(k_mask, k // PLACES, 0)
            place = k % PLACES
        channel += group * GROUP_IN
        down = place // WINDOW.size[1] * WINDOW.dilation[0]
        right = place % WINDOW.size[1] * WINDOW.dilation[1]
        if WIDE:
            channel = channel.to(tl.int64)
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for p0 in range(first, last, BLOCK_K):
            p = p0 + tl.arange(0, BLOCK_K)
            p_mask = p < last
            p = tl.where(p_mask, p, first)
            image = (p // (OH * OW)).to(tl.int64)
            pixel = p % (OH * OW)
            oh = pixel // OW
            ow = pixel % OW
            grad_image = image * OUT_C * GRAD_H * GRAD_W
            dy = load_gradient(
                (grad_ptr + grad_image)[:, None],
                (grad_ptr if SOURCE == "dense" else mask_ptr) + grad_image[:, None],
                oh,
                ow,
                out_at,
                p_mask[:, None] & out_mask[None, :],
                OUT_C,
                GRAD_H,
                GRAD_W,
                SOURCE,
                POOL,
                GRAD_CHANNELS_LAST,
            )
            top = oh * WINDOW.stride[0] - WINDOW.padding[0]
            left = ow * WINDOW.stride[1] - WINDOW.padding[1]
            h = top[:, None] + down[None, :]
            w = left[:, None] + right[None, :]
            inside = (h >= 0) & (h < H) & (w >= 0) & (w < W) & p_mask[:, None] & k_mask[None, :]
            # a place outside the image reads nothing, at an offset inside it
            if X_CHANNELS_LAST:
                at = ((top * W + left) * C)[:, None] + ((down * W + right) * C + channel)[None, :]
                at = tl.where(inside, at, channel[None, :])
            else:
                at = (top * W + left)[:, None] + (channel * H * W + down * W + right)[None, :]
                at = tl.where(inside, at, 0)
            x = tl.load((x_ptr + image * C * H * W)[:, None] + at, mask=inside, other=0.0)
            acc = multiply_add(tl.trans(dy), x, acc, PRECISION)
        partial_at = (split * OUT_C + out)[:, None] * K + k[None, :]
        tl.store(partial_ptr + partial_at, acc, mask=out_mask[:, None] & k_mask[None, :])


def wgrad(
    grad: Tensor,
    mask: Tensor | None,
    input: Tensor,
    weight: Tensor,
    bias_grad: bool,
    config: str | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    pool: Window | None,
) -> tuple[Tensor, Tensor]:
    """Operator ``fastcnn::wgrad.triton``: the gradients of weight and bias (without elements where not asked for)."""
    source = Source.of(grad, mask, pool)
    x, window = dense(input), conv_window(weight, stride, padding, dilation)
    images, channels, height, width = x.shape
    out_channels, group_in, rows, columns = weight.shape
    out_height, out_width = window.output_size(height, width)
    format = conv_memory_format(input, weight)
    dw = torch.empty(weight.shape, dtype=x.dtype, device=x.device, memory_format=format)
    pixels = images * out_height * out_width
    if pixels == 0:
        return dw.zero_(), dw.new_zeros(out_channels if bias_grad else 0)
    wide = is_wide_convolution(source, x, pixels)
    narrow = wide or not source.channels_last or group_in % 8 != 0
    tile = pick(CONFIGS, config, out_channels // groups, group_in * rows * columns, x.element_size(), narrow)
    blocks_m = triton.cdiv(out_channels // groups, tile.block_m)
    blocks_n = triton.cdiv(group_in * rows * columns, tile.block_n)
    split = split_pixels(pixels, groups * blocks_m * blocks_n, tile.block_k)
    splits = triton.cdiv(pixels, split)
    partial = x.new_empty((splits, weight.numel()), dtype=torch.float32)
    bias = x.new_empty((splits, out_channels if bias_grad else 0), dtype=torch.float32)
    wgrad_kernel[(splits * groups * blocks_m * (blocks_n + bias_grad),)](
        source.grad, source.mask, x, partial, bias, pixels, split, channels, height, width,
        out_channels, out_height, out_width, source.grad.shape[2], source.grad.shape[3],
        group_in, out_channels // groups, blocks_m, blocks_n, groups,
        WINDOW=window, SOURCE=source.kind, POOL=source.pool, BIAS_GRAD=bias_grad,
        GRAD_CHANNELS_LAST=source.channels_last, X_CHANNELS_LAST=is_channels_last(x),
        W_CHANNELS_LAST=is_channels_last(dw),
        WIDE=wide, PRECISION=dot_precision(x.dtype),
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k,
        num_warps=tile.num_warps, num_stages=tile.num_stages, maxnreg=REGISTERS,
    )  # fmt: skip
    dw.as_strided((weight.numel(),), (1,)).copy_(partial.sum(0))
    return dw, bias.sum(0).to(dw.dtype)


def split_pixels(pixels: int, tiles: int, block: int) -> int:
    """Return how many pixels one program sums: whole blocks, by shapes alone, so that the sums repeat."""
    splits = max(1, min(PROGRAMS // tiles, pixels // (LEAST_STEPS * block)))
    return triton.cdiv(triton.cdiv(pixels, splits), block) * block
