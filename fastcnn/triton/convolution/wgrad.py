"""Gradient of a convolution's weight in Triton, and of its bias on the way: products over pixels, in parts.

Layout: NCHW or NHWC for gradient and input, OIHW or OHWI for the weight's gradient.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcnn.shapes import Window, conv_memory_format
from fastcnn.triton.convolution.gradient import Source, is_wide_convolution, load_gradient, pick
from fastcnn.triton.convolution.implicit_gemm import ChannelsLast, Config, Sizes, constants, load_places, split_columns
from fastcnn.triton.tiles import added, ceil_div, laid_out, multiply_add, sum_pixels

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
def pixels_of(p0, first, last, image_pixels, width, BLOCK_K: tl.constexpr):
    """Return image, row and column of pixels from p0 on, and which come before the last; the first's for the others."""
    p = p0 + tl.arange(0, BLOCK_K)
    mask = p < last
    p = tl.where(mask, p, first)
    pixel = p % image_pixels
    return (p // image_pixels).to(tl.int64), pixel // width, pixel % width, mask


@triton.jit
def wgrad_kernel(
    grad_ptr, mask_ptr, x_ptr, partial_ptr, bias_ptr, P, SPLIT, BLOCKS_M, BLOCKS_N, sizes, grad_size,
    WINDOW: tl.constexpr, POOL: tl.constexpr, LAST: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    CONFIG: tl.constexpr,
):  # fmt: skip
    """Write partial: (splits, OUT_C, K), the weight's gradient by parts of P = N * OH * OW pixels of the output.

    K runs over the kernel's places and the group's input channels, in the weight's memory order. One program sums
    SPLIT pixels of block_m output channels by block_n of K. If the bias gradient is wanted there is one more block of
    K, whose program sums the gradient itself into bias: (splits, OUT_C).
    """
    BLOCK_K: tl.constexpr = CONFIG.block_k
    OUT_C, GROUP_OUT, OW = sizes.out_channels, sizes.group_out, sizes.out_width
    image_pixels = sizes.out_height * OW
    pid = tl.program_id(0)
    COLUMNS = BLOCKS_N if bias_ptr is None else BLOCKS_N + 1
    block_n = pid % COLUMNS
    block_m = pid // COLUMNS % BLOCKS_M
    group = pid // COLUMNS // BLOCKS_M % sizes.groups
    split = (pid // COLUMNS // BLOCKS_M // sizes.groups).to(tl.int64)
    out = block_m * CONFIG.block_m + tl.arange(0, CONFIG.block_m)
    out_mask = out < GROUP_OUT
    out = group * GROUP_OUT + out % GROUP_OUT  # in range, and still in runs that one load can take
    out_at = out.to(tl.int64) if WIDE else out
    first = split * SPLIT
    last = tl.minimum(first + SPLIT, P)
    if not WIDE:
        first, last = first.to(tl.int32), last.to(tl.int32)
    if bias_ptr is not None and block_n == BLOCKS_N:
        sums = tl.full((BLOCK_K, CONFIG.block_m), 0.0, tl.float32)
        for p0 in range(first, last, BLOCK_K):
            image, oh, ow, p_mask = pixels_of(p0, first, last, image_pixels, OW, BLOCK_K)
            here = p_mask[:, None] & out_mask[None, :]
            dy = load_gradient(grad_ptr, mask_ptr, image, oh, ow, out_at, here, OUT_C, grad_size, POOL, LAST)
            sums += dy.to(tl.float32)
        tl.store(bias_ptr + split * OUT_C + out, sum_pixels(sums, BLOCK_K, CONFIG.block_m), mask=out_mask)
    else:
        K = sizes.group_in * (WINDOW.size[0] * WINDOW.size[1])
        k = block_n * CONFIG.block_n + tl.arange(0, CONFIG.block_n)
        k_mask = k < K
        channel, down, right = split_columns(k, group, sizes.group_in, WINDOW, LAST, WIDE)
        acc = tl.full((CONFIG.block_m, CONFIG.block_n), 0.0, tl.float32)
        for p0 in range(first, last, BLOCK_K):
            image, oh, ow, p_mask = pixels_of(p0, first, last, image_pixels, OW, BLOCK_K)
            here = p_mask[:, None] & out_mask[None, :]
            dy = load_gradient(grad_ptr, mask_ptr, image, oh, ow, out_at, here, OUT_C, grad_size, POOL, LAST)
            top = oh * WINDOW.stride[0] - WINDOW.padding[0]
            left = ow * WINDOW.stride[1] - WINDOW.padding[1]
            here = p_mask[:, None] & k_mask[None, :]
            x, _ = load_places(
                x_ptr, image, top, left, channel, down, right, here, sizes.channels, sizes.height, sizes.width, LAST
            )
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
    window: Window,
    groups: int,
    pool: Window | None,
) -> tuple[Tensor, Tensor]:
    """Operator ``fastcnn::wgrad.triton``: the gradients of weight and bias (without elements where not asked for)."""
    source = Source.of(grad, mask, pool)
    x, _, x_last = laid_out(input)
    sizes, columns = Sizes.of(x, weight, window, groups), weight[0].numel()
    format = conv_memory_format(input, weight)
    dw = torch.empty(weight.shape, dtype=x.dtype, device=x.device, memory_format=format)
    pixels = x.shape[0] * sizes.out_height * sizes.out_width
    if pixels == 0:
        return dw.zero_(), dw.new_zeros(sizes.out_channels if bias_grad else 0)
    wide = is_wide_convolution(source, x, pixels)
    narrow = wide or not source.channels_last or sizes.group_in % 8 != 0
    tile = pick(CONFIGS, config, sizes.group_out, columns, x.element_size(), narrow)
    blocks_m, blocks_n = ceil_div(sizes.group_out, tile.block_m), ceil_div(columns, tile.block_n)
    # by shapes alone, so that the sums repeat
    splits = max(1, min(PROGRAMS // (groups * blocks_m * blocks_n), pixels // (LEAST_STEPS * tile.block_k)))
    split = ceil_div(ceil_div(pixels, splits), tile.block_k) * tile.block_k  # pixels that one program sums
    splits = ceil_div(pixels, split)
    partial = x.new_empty((splits, weight.numel()), dtype=torch.float32)
    bias = x.new_empty((splits, sizes.out_channels), dtype=torch.float32) if bias_grad else None
    last = ChannelsLast(x_last, format == torch.channels_last, False, source.channels_last)
    wgrad_kernel[(splits * groups * blocks_m * (blocks_n + bias_grad),)](
        source.grad, source.mask, x, partial, bias, pixels, split, blocks_m, blocks_n, sizes, source.size,
        WINDOW=window, POOL=source.pool, LAST=last, **constants(tile, x.dtype, wide),
    )  # fmt: skip
    dw.as_strided((weight.numel(),), (1,)).copy_(partial.sum(0))
    return dw, added(bias, dw)
