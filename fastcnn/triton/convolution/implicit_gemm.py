"""Convolution in Triton as one implicit GEMM, with bias and ReLU at its end, and what other convolutions share with it.

Layout: NCHW or NHWC for input and output, OIHW or OHWI for the weight.
"""

import re
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcnn.shapes import Window
from fastcnn.triton.normalize import shift_and_scale
from fastcnn.triton.tiles import ceil_div, is_wide, laid_out, multiply_add, offset, power_of_2, vector


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


CONFIGS = (Config(128, 64, 32, 8, 3), Config(64, 64, 32, 8, 3), Config(64, 32, 32, 4, 3), Config(64, 16, 32, 4, 3))
EXACT = Config(64, 64, 16, 8, 3)  # of float32 without TF32, whose products take registers


# Let ptxas use as many registers as there are: left to itself, for sm_100 and later it spills to leave more unused.
REGISTERS = 255


class Convolution(NamedTuple):
    """A convolution to launch: its result is (N, C_out, OH, OW) in the weight's dtype.

    `config` is the tile that is asked for; `norm`, a mean and a deviation for each channel, normalizes images.
    """

    input: Tensor
    weight: Tensor
    bias: Tensor | None
    window: Window
    groups: int
    relu: bool
    config: Config | None = None
    norm: tuple[Tensor | None, Tensor | None] = (None, None)


class Sizes(NamedTuple):
    """A convolution's sizes, as kernels read them."""

    channels: int
    height: int
    width: int
    out_channels: int
    out_height: int
    out_width: int
    group_in: int
    group_out: int
    groups: int

    @classmethod
    def of(cls, input: Tensor, weight: Tensor, window: Window, groups: int) -> "Sizes":
        """Return the sizes of a call."""
        channels, height, width = input.shape[1:]
        out_channels, (out_height, out_width) = weight.shape[0], window.output_size(height, width)
        outputs = out_channels, out_height, out_width
        return cls(channels, height, width, *outputs, channels // groups, out_channels // groups, groups)


class ChannelsLast(NamedTuple):
    """A kernel's constants: of which tensors channels are the fastest axis."""

    x: bool
    weight: bool
    out: bool
    grad: bool = False


@triton.jit
def split_rows(m, mask, HEIGHT, WIDTH, WIDE: tl.constexpr):
    """Return the images of the product's rows m, and the pixels in them; the first row's where `mask` is false."""
    m = tl.where(mask, m, 0)
    pixel = m % (HEIGHT * WIDTH)
    if not WIDE:
        pixel = pixel.to(tl.int32)
    return m // (HEIGHT * WIDTH), pixel


@triton.jit
def split_columns(k, group, GROUP_IN, WINDOW: tl.constexpr, LAST: tl.constexpr, WIDE: tl.constexpr):
    """Return channel, and rows and columns from a window's first place, of a weight's columns k in memory order."""
    PLACES: tl.constexpr = WINDOW.size[0] * WINDOW.size[1]
    if LAST.weight:
        channel = k % GROUP_IN
        place = k // GROUP_IN
    else:
        channel = tl.where(k < GROUP_IN * PLACES, k // PLACES, 0)
        place = k % PLACES
    channel += group * GROUP_IN
    if WIDE:
        channel = channel.to(tl.int64)
    return channel, place // WINDOW.size[1] * WINDOW.dilation[0], place % WINDOW.size[1] * WINDOW.dilation[1]


@triton.jit
def load_places(
    x_ptr, image, top, left, channel, down, right, mask, C, H, W, LAST: tl.constexpr, FEW: tl.constexpr = False
):
    """Load an input's places (down, right) of the windows that start at top, left: [P, K]; and which are inside it.

    Args: image, top, left: [P]; channel, down, right: [K]; mask: [P, K]. FEW channels: no vectors of them to preserve.
    """
    h = top[:, None] + down[None, :]
    w = left[:, None] + right[None, :]
    inside = (h >= 0) & (h < H) & (w >= 0) & (w < W) & mask
    # a place outside the image reads nothing, at an offset inside it
    if FEW:
        at = tl.where(inside, offset(channel[None, :], h * W + w, C, H * W, LAST.x), 0)
    elif LAST.x:
        at = ((top * W + left) * C)[:, None] + ((down * W + right) * C + channel)[None, :]
        at = tl.where(inside, at, channel[None, :])
    else:
        at = (top * W + left)[:, None] + (channel * H * W + down * W + right)[None, :]
        at = tl.where(inside, at, 0)
    return tl.load((x_ptr + image * C * H * W)[:, None] + at, mask=inside, other=0), inside


@triton.jit
def implicit_gemm_kernel(
    x_ptr, mean_ptr, std_ptr, w_ptr, bias_ptr, y_ptr, M, BLOCKS_N, sizes, CHANNELS: tl.constexpr,
    WINDOW: tl.constexpr, RELU: tl.constexpr, LAST: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    CONFIG: tl.constexpr,
):  # fmt: skip
    """Convolve x: (N, C, H, W) with w: (OUT_C, C / groups, KH, KW) as a matrix product; bias and ReLU at its end.

    M = N * OH * OW output pixels; K runs over the kernel's places and input channels, in the weight's memory order.
    One program computes block_m pixels of block_n channels of one group. CHANNELS: of the input, where they are few and
    the compiler should know them. With a mean, images are normalized between their load and the product, zero around.
    """
    GROUP_IN = sizes.group_in if CHANNELS is None else CHANNELS
    C = sizes.channels if CHANNELS is None else CHANNELS
    OH, OW = sizes.out_height, sizes.out_width
    pid = tl.program_id(0)
    block_n = pid % BLOCKS_N
    group = pid // BLOCKS_N % sizes.groups
    m = (pid // BLOCKS_N // sizes.groups).to(tl.int64) * CONFIG.block_m + tl.arange(0, CONFIG.block_m)
    m_mask = m < M
    image, pixel = split_rows(m, m_mask, OH, OW, WIDE)
    top = pixel // OW * WINDOW.stride[0] - WINDOW.padding[0]
    left = pixel % OW * WINDOW.stride[1] - WINDOW.padding[1]
    out = block_n * CONFIG.block_n + tl.arange(0, CONFIG.block_n)
    out_mask = out < sizes.group_out
    if CHANNELS is None:  # otherwise there is one group
        out = group * sizes.group_out + out % sizes.group_out  # in range, and still in runs that one store can take
    K = GROUP_IN * (WINDOW.size[0] * WINDOW.size[1])
    w_rows = w_ptr + out.to(tl.int64) * K
    acc = tl.full((CONFIG.block_m, CONFIG.block_n), 0.0, tl.float32)
    for k0 in range(0, K, CONFIG.block_k):
        k = k0 + tl.arange(0, CONFIG.block_k)
        channel, down, right = split_columns(k, group, GROUP_IN, WINDOW, LAST, WIDE)
        mask = m_mask[:, None] & (k < K)[None, :]
        x, inside = load_places(
            x_ptr, image, top, left, channel, down, right, mask, C, sizes.height, sizes.width, LAST,
            CHANNELS is not None,
        )  # fmt: skip
        if mean_ptr is not None:
            shift, scale = shift_and_scale(mean_ptr, std_ptr, channel, k < K, x_ptr.dtype.element_ty == tl.uint8)
            x = tl.where(inside, (x.to(tl.float32) - shift[None, :]) * scale[None, :], 0.0).to(w_ptr.dtype.element_ty)
        w_mask = (k < K)[:, None] & out_mask[None, :]
        weight = tl.load(w_rows[None, :] + k[:, None], mask=w_mask, other=0.0)
        acc = multiply_add(x, weight, acc, PRECISION)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + out, mask=out_mask, other=0.0).to(tl.float32)[None, :]
    if RELU:
        acc = tl.where(acc <= 0.0, 0.0, acc)
    y_rows = y_ptr + image * sizes.out_channels * OH * OW
    if WIDE:
        out = out.to(tl.int64)
    y_at = offset(out[None, :], pixel[:, None], sizes.out_channels, OH * OW, LAST.out)
    tl.store(y_rows[:, None] + y_at, acc.to(y_ptr.dtype.element_ty), mask=m_mask[:, None] & out_mask[None, :])


def demand(algorithm: str, *rules: tuple[str, str, Any, bool]) -> None:
    """Raise a RuntimeError for the first rule that does not hold: (argument, what is taken, what came, whether)."""
    for argument, taken, got, holds in rules:
        if not holds:
            raise RuntimeError(f"backend 'triton' by {algorithm!r} takes argument {argument!r} {taken}, got {got}")


def dot_precision(dtype: torch.dtype) -> str:
    """Return how float32 products are taken: TF32 exactly where torch's setting for convolutions says so."""
    tf32 = dtype == torch.float32 and torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]
    return "tf32" if tf32 else "ieee"


def constants(config: Config, dtype: torch.dtype, wide: bool, registers: int | None = REGISTERS) -> dict[str, Any]:
    """Return what every convolution's launch ends with."""
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "maxnreg": registers}
    return {"CONFIG": config, "PRECISION": dot_precision(dtype), "WIDE": wide, **options}


def launch(call: Convolution, configs: tuple[Config, ...], wide_config: Config, channels: int | None = None) -> Tensor:
    """Launch the kernel, by one of `configs` where none is asked for; the compiler knows `channels` that are given.

    `wide_config` is the one that spills on no architecture with 64-bit offsets.
    """
    _, _, bias, window, groups, relu, config, norm = call
    (x, _, x_last), (w, _, w_last) = laid_out(call.input), laid_out(call.weight)
    sizes, format = Sizes.of(x, w, window, groups), torch.channels_last if x_last or w_last else torch.contiguous_format
    shape = (x.shape[0], sizes.out_channels, sizes.out_height, sizes.out_width)
    y = torch.empty(shape, dtype=w.dtype, device=x.device, memory_format=format)
    if y.numel() == 0:
        return y
    wide, exact = is_wide(x, y), w.dtype == torch.float32 and dot_precision(w.dtype) == "ieee"
    if config is None and exact and not wide:
        config = EXACT._replace(block_n=max(16, min(EXACT.block_n, power_of_2(sizes.group_out))))
    fitting = [each for each in configs if each.block_n <= power_of_2(sizes.group_out)]  # wide ones read the input less
    config = config or (wide_config if wide else [*fitting, configs[-1]][0])
    pixels, blocks_n = y.numel() // sizes.out_channels, ceil_div(sizes.group_out, config.block_n)
    implicit_gemm_kernel[(ceil_div(pixels, config.block_m) * groups * blocks_n,)](
        x, *norm, w, vector(bias), y, pixels, blocks_n, sizes,
        CHANNELS=channels, WINDOW=window, RELU=relu, LAST=ChannelsLast(x_last, w_last, x_last or w_last),
        **constants(config, w.dtype, wide, REGISTERS if exact else None),
    )  # fmt: skip
    return y


def implicit_gemm(call: Convolution) -> Tensor:
    """Launch the implicit GEMM."""
    return launch(call, CONFIGS, CONFIGS[1])


def asked(algorithm: str | None) -> tuple[str, Config | None]:
    """Split ``implicit_gemm:128x64x32w8s3`` into an algorithm and its configuration."""
    name, _, config = (algorithm or "").partition(":")
    return name, Config(*map(int, re.findall(r"\d+", config))) if config else None
