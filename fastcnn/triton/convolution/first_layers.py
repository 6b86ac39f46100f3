"""Convolutions of few input channels in Triton, optionally with the normalization of the images.

`packed`: an implicit GEMM whose K, all places of all channels, is a step or a few. `space_to_depth`: a strided
convolution as one of stride 1, over images whose blocks of stride x stride pixels have become channels.
Layout: NCHW or NHWC for input and output, OIHW or OHWI for the weight.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from fastcnn.shapes import Window, conv_memory_format
from fastcnn.triton.convolution.implicit_gemm import Config, dot_precision, implicit_gemm
from fastcnn.triton.normalize import is_wide_as_a_whole, per_channel, shift_and_scale
from fastcnn.triton.tiles import dense, is_channels_last, is_wide, multiply_add, offset, vector

MOST_CHANNELS = 4  # of a packed convolution
CHANNEL_MULTIPLE = 16  # of what space_to_depth makes: 32 bytes, a whole step of a matrix instruction
BLOCK = 1024
CONFIGS = (
    Config(128, 64, 32, 8, 1),
    Config(64, 64, 32, 4, 1),
    Config(64, 32, 32, 4, 1),
    Config(64, 16, 32, 4, 1),
)


class Norm(NamedTuple):
    """Constants of a normalization, one a channel or one for all, in float32."""

    mean: Tensor
    std: Tensor


@triton.jit
def packed_kernel(
    x_ptr,
    mean_ptr,
    std_ptr,
    w_ptr,
    bias_ptr,
    y_ptr,
    M,
    H,
    W,
    OUT_C,
    OH,
    OW,
    BLOCKS_N,
    C: tl.constexpr,
    WINDOW: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BYTES: tl.constexpr,
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
    """Convolve x: (N, C, H, W) with w: (OUT_C, C, KH, KW); bias and ReLU at its end.

    M = N * OH * OW output pixels; K runs over places and channels in the weight's memory order. One program computes
    BLOCK_M pixels of BLOCK_N channels. Images are normalized between their load and the product, and zero around.
    """
    PLACES: tl.constexpr = WINDOW.size[0] * WINDOW.size[1]
    K: tl.constexpr = C * PLACES
    pid = tl.program_id(0)
    m = (pid // BLOCKS_N).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_mask = m < M
    m = tl.where(m_mask, m, 0)
    image = m // (OH * OW)
    pixel = m % (OH * OW)
    if not WIDE:
        pixel = pixel.to(tl.int32)
    top = pixel // OW * WINDOW.stride[0] - WINDOW.padding[0]
    left = pixel % OW * WINDOW.stride[1] - WINDOW.padding[1]
    x_rows = x_ptr + image * C * H * W
    out = pid % BLOCKS_N * BLOCK_N + tl.arange(0, BLOCK_N)
    out_mask = out < OUT_C
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        k_mask = k < K
        k = tl.where(k_mask, k, 0)
        channel = k % C if W_CHANNELS_LAST else k // PLACES
        place = k // C if W_CHANNELS_LAST else k % PLACES
        down = place // WINDOW.size[1] * WINDOW.dilation[0]
        right = place % WINDOW.size[1] * WINDOW.dilation[1]
        if WIDE:
            channel = channel.to(tl.int64)
        h = top[:, None] + down[None, :]
        w = left[:, None] + right[None, :]
        inside = (h >= 0) & (h < H) & (w >= 0) & (w < W) & m_mask[:, None] & k_mask[None, :]
        # a place outside the image reads nothing, at its first element
        x_at = tl.where(inside, offset(channel[None, :], h * W + w, C, H * W, X_CHANNELS_LAST), 0)
        x = tl.load(x_rows[:, None] + x_at, mask=inside, other=0)
        if NORMALIZE:
            shift, scale = shift_and_scale(mean_ptr, std_ptr, channel, k_mask, BYTES)
            x = (x.to(tl.float32) - shift[None, :]) * scale[None, :]
            x = tl.where(inside, x, 0.0).to(w_ptr.dtype.element_ty)
        weight = tl.load(
            w_ptr + out[None, :].to(tl.int64) * K + k[:, None], mask=k_mask[:, None] & out_mask[None, :], other=0.0
        )
        acc = multiply_add(x, weight, acc, PRECISION)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + out, mask=out_mask, other=0.0).to(tl.float32)[None, :]
    if RELU:
        acc = tl.where(acc <= 0.0, 0.0, acc)
    if WIDE:
        out = out.to(tl.int64)
    y_at = (image * OUT_C * OH * OW)[:, None] + offset(out[None, :], pixel[:, None], OUT_C, OH * OW, Y_CHANNELS_LAST)
    tl.store(y_ptr + y_at, acc.to(y_ptr.dtype.element_ty), mask=m_mask[:, None] & out_mask[None, :])


@triton.jit
def space_to_depth_kernel(
    x_ptr,
    mean_ptr,
    std_ptr,
    y_ptr,
    ELEMENTS,
    H,
    W,
    ROWS,
    COLUMNS,
    C: tl.constexpr,
    CHANNELS: tl.constexpr,
    WINDOW: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BYTES: tl.constexpr,
    X_CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Rearrange the padded x: (N, C, H, W) into y: (N, CHANNELS, ROWS, COLUMNS), channels last.

    Channels of y are (row in the block, column in the block, channel of x), then zeros; blocks are as large as the
    window's stride. One program writes BLOCK elements of y; images are normalized on the way, and zero around.
    """
    DOWN: tl.constexpr = WINDOW.stride[0]
    RIGHT: tl.constexpr = WINDOW.stride[1]
    block = tl.program_id(0)
    if WIDE:
        block = block.to(tl.int64)
    at = block * BLOCK + tl.arange(0, BLOCK)
    cell = at // CHANNELS
    channel = at % CHANNELS % C
    place = at % CHANNELS // C
    image = cell // COLUMNS // ROWS
    h = cell // COLUMNS % ROWS * DOWN + place // RIGHT - WINDOW.padding[0]
    w = cell % COLUMNS * RIGHT + place % RIGHT - WINDOW.padding[1]
    inside = (at < ELEMENTS) & (place < DOWN * RIGHT) & (h >= 0) & (h < H) & (w >= 0) & (w < W)
    x_at = image * C * H * W + offset(channel, h * W + w, C, H * W, X_CHANNELS_LAST)
    x = tl.load(x_ptr + tl.where(inside, x_at, 0), mask=inside, other=0)
    if NORMALIZE:
        shift, scale = shift_and_scale(mean_ptr, std_ptr, channel, inside, BYTES)
        x = tl.where(inside, (x.to(tl.float32) - shift) * scale, 0.0)
    tl.store(y_ptr + at, x.to(y_ptr.dtype.element_ty), mask=at < ELEMENTS)


def _constants(norm: Norm | None, channels: int) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if norm is None else (per_channel(norm.mean, channels), per_channel(norm.std, channels))


def _refuse(name: str, argument: str, expected: str, got: object) -> None:
    raise RuntimeError(f"backend 'triton' by {name!r} takes argument {argument!r} {expected}, got {got}")


def packed(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    window: Window,
    groups: int,
    relu: bool,
    config: Config | None = None,
    norm: Norm | None = None,
) -> Tensor:
    """Launch the packed convolution: (N, C_out, OH, OW) in the weight's dtype.

    Raises:
        RuntimeError: groups, or more than four channels.
    """
    images, channels, height, width = input.shape
    if groups != 1:
        _refuse("packed", "groups", "= 1", groups)
    if channels > MOST_CHANNELS:
        _refuse("packed", "input", f"with up to {MOST_CHANNELS} channels", channels)
    x, w = dense(input), dense(weight)
    out_channels = w.shape[0]
    shape = (images, out_channels, *window.output_size(height, width))
    y = torch.empty(shape, dtype=w.dtype, device=x.device, memory_format=conv_memory_format(input, weight))
    if y.numel() == 0:
        return y
    wide = is_wide(x, y)
    config = config or pick_config(out_channels, wide)
    pixels = images * shape[2] * shape[3]
    blocks_n = triton.cdiv(out_channels, config.block_n)
    packed_kernel[(triton.cdiv(pixels, config.block_m) * blocks_n,)](
        x, *_constants(norm, channels), w, vector(bias), y, pixels, height, width, out_channels, *shape[2:], blocks_n,
        C=channels, WINDOW=window, NORMALIZE=norm is not None, BYTES=x.dtype == torch.uint8,
        HAS_BIAS=bias is not None, RELU=relu, X_CHANNELS_LAST=is_channels_last(x),
        W_CHANNELS_LAST=is_channels_last(w), Y_CHANNELS_LAST=is_channels_last(y),
        WIDE=wide, PRECISION=dot_precision(w.dtype),
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return y


def pick_config(out_channels: int, wide: bool) -> Config:
    """Return the tile whose channels fit best; a wider one reads the images less often."""
    if wide:
        return CONFIGS[-1]  # 64-bit offsets take registers
    fitting = [config for config in CONFIGS if config.block_n <= triton.next_power_of_2(out_channels)]
    return fitting[0] if fitting else CONFIGS[-1]


def space_to_depth(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    window: Window,
    groups: int,
    relu: bool,
    config: Config | None = None,
    norm: Norm | None = None,
) -> Tensor:
    """Rearrange a strided convolution's input and weight, and convolve with stride 1: (N, C_out, OH, OW).

    Raises:
        RuntimeError: groups, dilation, or no stride.
    """
    if groups != 1:
        _refuse("space_to_depth", "groups", "= 1", groups)
    if window.dilation != (1, 1):
        _refuse("space_to_depth", "dilation", "= (1, 1)", window.dilation)
    if window.stride == (1, 1):
        _refuse("space_to_depth", "stride", "over 1", window.stride)
    blocks = Window(_steps(window.size, window.stride), (1, 1), (0, 0), (1, 1), False)
    deep, deep_weight = deep_input(input, weight.dtype, window, norm), deepen_weight(weight, window.stride)
    format = conv_memory_format(input, weight)
    # A stride-1 convolution over whole vectors of channels: any kernel for such ones can take its place.
    return implicit_gemm(deep, deep_weight, bias, blocks, 1, relu, config).contiguous(memory_format=format)


def _steps(sizes: tuple[int, int], stride: tuple[int, int]) -> tuple[int, int]:
    return triton.cdiv(sizes[0], stride[0]), triton.cdiv(sizes[1], stride[1])


def _deep_channels(channels: int, stride: tuple[int, int]) -> int:
    return triton.cdiv(channels * stride[0] * stride[1], CHANNEL_MULTIPLE) * CHANNEL_MULTIPLE


def deep_input(input: Tensor, dtype: torch.dtype, window: Window, norm: Norm | None) -> Tensor:
    """Launch space to depth: the pixels that the convolution reads, padding included, with blocks as channels."""
    x = dense(input)
    images, channels, height, width = x.shape
    deep_channels = _deep_channels(channels, window.stride)
    out, steps = window.output_size(height, width), _steps(window.size, window.stride)
    rows, columns = (out[axis] + steps[axis] - 1 for axis in (0, 1))
    shape = (images, deep_channels, rows, columns)
    deep = torch.empty(shape, dtype=dtype, device=x.device, memory_format=torch.channels_last)
    if deep.numel() == 0:
        return deep
    space_to_depth_kernel[(triton.cdiv(deep.numel(), BLOCK),)](
        x, *_constants(norm, channels), deep, deep.numel(), height, width, rows, columns,
        C=channels, CHANNELS=deep_channels, WINDOW=window, NORMALIZE=norm is not None, BYTES=x.dtype == torch.uint8,
        X_CHANNELS_LAST=is_channels_last(x), WIDE=is_wide_as_a_whole(x, deep), BLOCK=BLOCK,
    )  # fmt: skip
    return deep


def deepen_weight(weight: Tensor, stride: tuple[int, int]) -> Tensor:
    """Rearrange a weight to match: (C_out, C, KH, KW) to (C_out, deep channels, blocks, blocks), zeros at the ends."""
    out_channels, channels, *size = weight.shape
    rows, columns = _steps((size[0], size[1]), stride)
    whole = F.pad(weight, (0, columns * stride[1] - size[1], 0, rows * stride[0] - size[0]))
    blocks = whole.reshape(out_channels, channels, rows, stride[0], columns, stride[1]).permute(0, 2, 4, 3, 5, 1)
    deep = blocks.reshape(out_channels, rows, columns, -1)
    return F.pad(deep, (0, _deep_channels(channels, stride) - deep.shape[3])).permute(0, 3, 1, 2)


ALGORITHMS = {"packed": packed, "space_to_depth": space_to_depth}
