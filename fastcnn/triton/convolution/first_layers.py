"""Convolutions of few input channels in Triton, optionally with the normalization of the images.

`packed`: the implicit GEMM whose compiler knows the channels: K, all places of all of them, is a step or a few.
`space_to_depth`: a strided convolution as one of stride 1, over images whose blocks of stride x stride pixels have
become channels.
Layout: NCHW or NHWC for input and output, OIHW or OHWI for the weight.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from fastcnn.shapes import Window, conv_memory_format
from fastcnn.triton.convolution.implicit_gemm import Config, Convolution, demand, implicit_gemm, launch
from fastcnn.triton.normalize import shift_and_scale
from fastcnn.triton.tiles import ceil_div, fits_int32, indices, laid_out, offset

MOST_CHANNELS = 4  # of a packed convolution
CHANNEL_MULTIPLE = 16  # of what space_to_depth makes: 32 bytes, a whole step of a matrix instruction
BLOCK = 1024
CONFIGS = (Config(128, 64, 32, 8, 1), Config(64, 64, 32, 4, 1), Config(64, 32, 32, 4, 1), Config(64, 16, 32, 4, 1))


@triton.jit
def space_to_depth_kernel(
    x_ptr, mean_ptr, std_ptr, y_ptr, ELEMENTS, H, W, ROWS, COLUMNS, C: tl.constexpr, CHANNELS: tl.constexpr,
    WINDOW: tl.constexpr, X_CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rearrange the padded x: (N, C, H, W) into y: (N, CHANNELS, ROWS, COLUMNS), channels last.

    Channels of y are (row in the block, column in the block, channel of x), then zeros; blocks are as large as the
    window's stride. One program writes BLOCK elements of y; images are normalized on the way, and zero around.
    """
    DOWN: tl.constexpr = WINDOW.stride[0]
    RIGHT: tl.constexpr = WINDOW.stride[1]
    at = indices(tl.program_id(0), BLOCK, WIDE)
    cell = at // CHANNELS
    channel = at % CHANNELS % C
    place = at % CHANNELS // C
    image = cell // COLUMNS // ROWS
    h = cell // COLUMNS % ROWS * DOWN + place // RIGHT - WINDOW.padding[0]
    w = cell % COLUMNS * RIGHT + place % RIGHT - WINDOW.padding[1]
    inside = (at < ELEMENTS) & (place < DOWN * RIGHT) & (h >= 0) & (h < H) & (w >= 0) & (w < W)
    x_at = image * C * H * W + offset(channel, h * W + w, C, H * W, X_CHANNELS_LAST)
    x = tl.load(x_ptr + tl.where(inside, x_at, 0), mask=inside, other=0)
    if mean_ptr is not None:
        shift, scale = shift_and_scale(mean_ptr, std_ptr, channel, inside, x_ptr.dtype.element_ty == tl.uint8)
        x = tl.where(inside, (x.to(tl.float32) - shift) * scale, 0.0)
    tl.store(y_ptr + at, x.to(y_ptr.dtype.element_ty), mask=at < ELEMENTS)


def packed(call: Convolution) -> Tensor:
    """Launch the packed convolution; raise a RuntimeError for groups, or more than four channels."""
    channels = call.input.shape[1]
    demand(
        "packed",
        ("groups", "= 1", call.groups, call.groups == 1),
        ("input", f"with up to {MOST_CHANNELS} channels", channels, channels <= MOST_CHANNELS),
    )
    return launch(call, CONFIGS, CONFIGS[-1], channels)


def space_to_depth(call: Convolution) -> Tensor:
    """Rearrange a strided convolution's input and weight, and convolve with stride 1.

    Raises a RuntimeError for groups, dilation, or no stride.
    """
    window = call.window
    demand(
        "space_to_depth",
        ("groups", "= 1", call.groups, call.groups == 1),
        ("dilation", "= (1, 1)", window.dilation, window.dilation == (1, 1)),
        ("stride", "over 1", window.stride, window.stride != (1, 1)),
    )
    deep = call._replace(
        input=deep_input(call),
        weight=deepen_weight(call.weight, window.stride),
        window=Window(_steps(window.size, window.stride), (1, 1), (0, 0), (1, 1), False),
        norm=(None, None),
    )
    format = conv_memory_format(call.input, call.weight)
    # A stride-1 convolution over whole vectors of channels: any kernel for such ones can take its place.
    return implicit_gemm(deep).contiguous(memory_format=format)


def _steps(sizes: tuple[int, int], stride: tuple[int, int]) -> tuple[int, int]:
    return ceil_div(sizes[0], stride[0]), ceil_div(sizes[1], stride[1])


def _deep_channels(channels: int, stride: tuple[int, int]) -> int:
    return ceil_div(channels * stride[0] * stride[1], CHANNEL_MULTIPLE) * CHANNEL_MULTIPLE


def deep_input(call: Convolution) -> Tensor:
    """Launch space to depth: the pixels that the convolution reads, padding included, with blocks as channels."""
    (x, _, channels_last), window = laid_out(call.input), call.window
    images, channels, height, width = x.shape
    deep_channels = _deep_channels(channels, window.stride)
    out, steps = window.output_size(height, width), _steps(window.size, window.stride)
    rows, columns = (out[axis] + steps[axis] - 1 for axis in (0, 1))
    shape = (images, deep_channels, rows, columns)
    deep = torch.empty(shape, dtype=call.weight.dtype, device=x.device, memory_format=torch.channels_last)
    if deep.numel() == 0:
        return deep
    space_to_depth_kernel[(ceil_div(deep.numel(), BLOCK),)](
        x, *call.norm, deep, deep.numel(), height, width, rows, columns,
        C=channels, CHANNELS=deep_channels, WINDOW=window,
        X_CHANNELS_LAST=channels_last, WIDE=not fits_int32(x, deep), BLOCK=BLOCK,
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
