"""Convolution in Triton as one implicit GEMM, with bias and ReLU at its end; tiles that every convolution names alike.

Layout: NCHW or NHWC for input and output, OIHW or OHWI for the weight.
"""

import re
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcnn.shapes import Window, conv_memory_format
from fastcnn.triton.tiles import dense, is_channels_last, is_wide, multiply_add, offset, vector


class Config(NamedTuple):
    """A tile of the implicit GEMM: BLOCK_M output pixels by BLOCK_N output channels, BLOCK_K at a time."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int

    @property
    def name(self) -> str:
        """Return what tuning tables and ``use_backend`` call it; a configuration that changes gets another name."""
        return f"{self.block_m}x{self.block_n}x{self.block_k}w{self.num_warps}s{self.num_stages}"


CONFIGS = (
    Config(128, 64, 32, 8, 3),
    Config(64, 64, 32, 8, 3),
    Config(64, 32, 32, 4, 3),
    Config(64, 16, 32, 4, 3),
)


@triton.jit
def implicit_gemm_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    y_ptr,
    M,
    C,
    H,
    W,
    OUT_C,
    OH,
    OW,
    GROUP_IN,
    GROUP_OUT,
    BLOCKS_N,
    GROUPS,
    WINDOW: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RELU: tl.constexpr,
    X_CHANNELS_LAST: tl.constexpr,
    W_CHANNELS_LAST: tl.constexpr,
    Y_CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Convolve x: (N, C, H, W) with w: (OUT_C, C / groups, KH, KW) as a matrix product; bias and ReLU at its end.

    M = N * OH * OW output pixels; K runs over the kernel's places and input channels, in the weight's memory order.
    One program computes BLOCK_M pixels of BLOCK_N channels of one group.
    """
    pid = tl.program_id(0)
    block_n = pid % BLOCKS_N
    group = pid // BLOCKS_N % GROUPS
    m = (pid // BLOCKS_N // GROUPS).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_mask = m < M
    m = tl.where(m_mask, m, 0)
    image = m // (OH * OW)
    pixel = m % (OH * OW)
    if not WIDE:
        pixel = pixel.to(tl.int32)
    top = pixel // OW * WINDOW.stride[0] - WINDOW.padding[0]
    left = pixel % OW * WINDOW.stride[1] - WINDOW.padding[1]
    x_rows = x_ptr + image * C * H * W
    out = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    out_mask = out < GROUP_OUT
    out = group * GROUP_OUT + out % GROUP_OUT  # in range, and still in runs that one store can take
    K = GROUP_IN * WINDOW.size[0] * WINDOW.size[1]
    w_rows = w_ptr + out.to(tl.int64) * K
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        if W_CHANNELS_LAST:
            channel = k % GROUP_IN
            place = k // GROUP_IN
        else:
            channel = tl.where(k < K, k // (WINDOW.size[0] * WINDOW.size[1]), 0)
            place = k % (WINDOW.size[0] * WINDOW.size[1])
        channel += group * GROUP_IN
        down = place // WINDOW.size[1] * WINDOW.dilation[0]
        right = place % WINDOW.size[1] * WINDOW.dilation[1]
        if WIDE:
            channel = channel.to(tl.int64)
        h = top[:, None] + down[None, :]
        w = left[:, None] + right[None, :]
        inside = (h >= 0) & (h < H) & (w >= 0) & (w < W) & m_mask[:, None] & (k < K)[None, :]
        # a place outside the image reads nothing, at an offset inside it
        if X_CHANNELS_LAST:
            at = ((top * W + left) * C)[:, None] + ((down * W + right) * C + channel)[None, :]
            at = tl.where(inside, at, channel[None, :])
        else:
            at = (top * W + left)[:, None] + (channel * H * W + down * W + right)[None, :]
            at = tl.where(inside, at, 0)
        x = tl.load(x_rows[:, None] + at, mask=inside, other=0.0)
        w_mask = (k < K)[:, None] & out_mask[None, :]
        weight = tl.load(w_rows[None, :] + k[:, None], mask=w_mask, other=0.0)
        acc = multiply_add(x, weight, acc, PRECISION)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + out, mask=out_mask, other=0.0).to(tl.float32)[None, :]
    if RELU:
        acc = tl.where(acc <= 0.0, 0.0, acc)
    y_rows = y_ptr + image * OUT_C * OH * OW
    if WIDE:
        out = out.to(tl.int64)
    y_at = offset(out[None, :], pixel[:, None], OUT_C, OH * OW, Y_CHANNELS_LAST)
    tl.store(y_rows[:, None] + y_at, acc.to(y_ptr.dtype.element_ty), mask=m_mask[:, None] & out_mask[None, :])


def dot_precision(dtype: torch.dtype) -> str:
    """Return how float32 products are taken: TF32 exactly where torch's setting for convolutions says so."""
    tf32 = dtype == torch.float32 and torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]
    return "tf32" if tf32 else "ieee"


def pick_config(out_channels: int, wide: bool) -> Config:
    """Return the tile whose channels fit a group's best; wider tiles read the input less often."""
    if wide:
        return CONFIGS[1]  # spills on no architecture, with 64-bit offsets either
    fitting = [config for config in CONFIGS if config.block_n <= triton.next_power_of_2(out_channels)]
    return fitting[0] if fitting else CONFIGS[-1]


def implicit_gemm(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    window: Window,
    groups: int,
    relu: bool,
    config: Config | None = None,
) -> Tensor:
    """Launch the implicit GEMM: (N, C_out, OH, OW)."""
    x, w = dense(input), dense(weight)
    images, channels, height, width = x.shape
    out_channels = w.shape[0]
    out_height, out_width = window.output_size(height, width)
    shape = (images, out_channels, out_height, out_width)
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=conv_memory_format(input, weight))
    if y.numel() == 0:
        return y
    wide = is_wide(x, y)
    config = config or pick_config(out_channels // groups, wide)
    pixels = images * out_height * out_width
    blocks_n = triton.cdiv(out_channels // groups, config.block_n)
    implicit_gemm_kernel[(triton.cdiv(pixels, config.block_m) * groups * blocks_n,)](
        x, w, vector(bias), y, pixels, channels, height, width, out_channels, out_height, out_width,
        channels // groups, out_channels // groups, blocks_n, groups,
        WINDOW=window,
        HAS_BIAS=bias is not None, RELU=relu, X_CHANNELS_LAST=is_channels_last(x),
        W_CHANNELS_LAST=is_channels_last(w), Y_CHANNELS_LAST=is_channels_last(y),
        WIDE=wide, PRECISION=dot_precision(x.dtype),
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return y


def asked(algorithm: str | None) -> tuple[str, Config | None]:
    """Split ``implicit_gemm:128x64x32w8s3`` into an algorithm and its configuration."""
    name, _, config = (algorithm or "").partition(":")
    return name, Config(*map(int, re.findall(r"\d+", config))) if config else None


def conv_window(weight: Tensor, stride: list[int], padding: list[int], dilation: list[int]) -> Window:
    """Return a convolution's kernel as a window."""
    return Window.of(weight.shape[2:], stride, padding, dilation, False)
