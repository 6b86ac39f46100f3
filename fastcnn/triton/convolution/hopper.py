"""Shared by the Hopper convolutions: which calls they take, how an output is cut into boxes, and a tile's epilogue.

A tile is BLOCK_CO output channels by the pixels of one box: rows x columns x images, the images fastest. The copy
engine (TMA) brings boxes of the input, shifted by a tap; what lies outside the image reads as zero, which is the
padding. The weights are the product's left operand: a 2x2 window's four pixels then lie in one thread's registers.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcnn.shapes import RELU_OFF, Window, conv_memory_format
from fastcnn.triton.convolution.implicit_gemm import Config, asked, demand
from fastcnn.triton.tiles import ceil_div, vector

OFF = tl.constexpr(RELU_OFF)
CHANNELS_IN = 8  # a multiple of it: strides of 16 bytes
CHANNELS_OUT = 16  # likewise for the codes, of one byte
MULTIPROCESSORS = 132  # of an H100 or H200, where there is no GPU to ask
# A multiprocessor's rates by the clock, to compare tiles: products of 16-bit values, bytes from L2, bytes to memory.
# Of an H200, the first and the last as measured, the second estimated.
PRODUCTS, BYTES_IN, BYTES_OUT = 1700, 32, 18


class Box(NamedTuple):
    """The pixels of a tile."""

    rows: int
    columns: int
    images: int

    def fits_pairs(self) -> bool:
        """Whether no 2x2 window reaches beyond it."""
        return self.rows % 2 == 0 and self.columns % 2 == 0


# By the pixels of a tile: from boxes of one image to single pixels of many. Images that do not fill a box idle.
BOXES = {
    128: (Box(16, 8, 1), Box(4, 4, 8), Box(2, 2, 32), Box(1, 1, 128)),
    256: (Box(16, 16, 1), Box(8, 4, 8), Box(4, 4, 16), Box(2, 2, 64), Box(1, 1, 256)),
}


# A tile: block_m output channels by block_n pixels, block_k input channels at a time; stages of boxes being copied.
# Of the algorithm `tma`: tiles that read the input least often come first.
TMA = (
    Config(128, 256, 64, 8, 4),
    Config(256, 128, 64, 8, 4),
    Config(128, 128, 64, 8, 4),
    Config(128, 128, 64, 4, 3),
    Config(64, 256, 64, 4, 2),
    Config(64, 128, 64, 4, 3),
    Config(64, 128, 32, 4, 4),
)
# Of `warp_specialized`: the warps are those that multiply. Here, as that module needs Gluon.
WARP_SPECIALIZED = (
    Config(128, 256, 64, 8, 3),
    Config(256, 128, 64, 8, 3),
    Config(128, 128, 64, 8, 4),
    Config(64, 128, 64, 4, 4),
)


class Plan(NamedTuple):
    """How a call is cut: its configuration, its box, and the tiles along each axis."""

    config: Config
    box: Box
    tiles_h: int
    tiles_w: int
    tiles_n: int
    blocks_co: int

    @property
    def tiles(self) -> int:
        """Return how many tiles there are in all."""
        return self.tiles_h * self.tiles_w * self.tiles_n * self.blocks_co


class Sizes(NamedTuple):
    """What kernels read of a call: the sizes of its tensors, and the tiles along axes."""

    channels: int
    height: int
    width: int
    out_channels: int
    tiles_h: int
    tiles_w: int
    blocks_co: int


class Output(NamedTuple):
    """The convolution's output as far as it is needed: a 2x2 pool leaves out a last odd row or column."""

    images: int
    channels: int
    rows: int
    columns: int


@cache
def make_plan(
    configs: tuple[Config, ...], depth: int, taps: int, output: Output, pooled: bool, multiprocessors: int
) -> Plan:
    """Return the plan with the shortest estimated time; of equal ones the first configuration's.

    `depth`: channels of the input; `pooled`: 2x2 windows must lie inside a box.
    """

    def clocks(plan: Plan) -> float:
        channels, pixels, chunk = plan.config[:3]
        products = channels * pixels * chunk / PRODUCTS
        copies = (channels + pixels) * chunk * 2 / BYTES_IN
        tile = taps * ceil_div(depth, chunk) * max(products, copies) + channels * pixels * 2 / BYTES_OUT
        return ceil_div(plan.tiles, multiprocessors) * tile

    def best_box(config: Config) -> Plan:
        boxes = [box for box in BOXES[config.block_n] if box.fits_pairs() or not pooled]
        return min((cut(config, box, output) for box in boxes), key=lambda plan: plan.tiles)

    return min(map(best_box, configs), key=clocks)


def cut(config: Config, box: Box, output: Output) -> Plan:
    """Return the plan with this configuration and this box."""
    images, channels, rows, columns = output
    tiles = ceil_div(rows, box.rows), ceil_div(columns, box.columns), ceil_div(images, box.images)
    return Plan(config, box, *tiles, ceil_div(channels, config.block_m))


def refuse(
    name: str, capabilities: tuple[int, ...], input: Tensor, weight: Tensor, window: Window, groups: int
) -> None:
    """Raise a RuntimeError where an algorithm cannot serve a call."""
    channels, outputs, capability = input.shape[1], weight.shape[0], _capability(input.device)
    gpus = " or ".join(f"{each}.x" for each in capabilities if each)
    device = ".".join(map(str, capability)) if capability[0] else input.device
    able = capability[0] in capabilities or input.device.type == "meta"
    # float32 would be cut to TF32: descriptors that round it begin with Triton 3.7
    demand(
        name,
        ("input", "in bfloat16 or float16", input.dtype, input.dtype in (torch.bfloat16, torch.float16)),
        ("stride", "1", window.stride, window.stride == (1, 1)),
        ("groups", "1", groups, groups == 1),
        ("input", f"with a multiple of {CHANNELS_IN} channels", channels, channels % CHANNELS_IN == 0),
        ("weight", f"with a multiple of {CHANNELS_OUT} output channels", outputs, outputs % CHANNELS_OUT == 0),
        ("input", f"on a GPU of compute capability {gpus}", device, able),
    )


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


@cache
def multiprocessors(device: torch.device) -> int:
    """Return the number of multiprocessors of a GPU."""
    if device.type != "cuda":
        return MULTIPROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def pools_pairs(window: Window, rows: int, columns: int) -> bool:
    """Whether a pool over so many rows and columns is one of whole 2x2 windows side by side."""
    plain = window[:4] == ((2, 2), (2, 2), (0, 0), (1, 1))
    return plain and window.output_size(rows, columns) == (rows // 2, columns // 2)


class Boxed(NamedTuple):
    """A tensor as the copy engine sees it: its axes slowest first by name, not by stride, and a box of them."""

    base: Tensor
    shape: list[int]
    strides: list[int]
    box: list[int]


def pixels(tensor: Tensor, rows: int, columns: int, images: int, channels: int) -> Boxed:
    """Return a channels_last (N, C, H, W) as [H, W, N, C], in boxes of these sizes."""
    count, depth, height, width = tensor.shape
    strides = [width * depth, depth, height * width * depth, 1]
    return Boxed(tensor, [height, width, count, depth], strides, [rows, columns, images, channels])


def one_tap(weight: Tensor, outputs: int, channels: int) -> Boxed:
    """Return a channels_last (C_out, C, R, S) as [R * S, C_out, C], in boxes of one tap."""
    count, depth, rows, columns = weight.shape
    strides = [depth, rows * columns * depth, 1]
    return Boxed(weight, [rows * columns, count, depth], strides, [1, outputs, channels])


def channels_last(tensor: Tensor) -> Tensor:
    """Return the tensor in channels_last, at an address that the copy engine takes."""
    dense = tensor.contiguous(memory_format=torch.channels_last)
    return dense.clone(memory_format=torch.channels_last) if dense.data_ptr() % 16 else dense


class Algorithm(NamedTuple):
    """A Hopper convolution: its configurations, and the major compute capabilities that it is made for."""

    name: str
    configs: tuple[Config, ...]
    capabilities: tuple[int, ...]  # 0 is Triton's interpreter
    launch: Callable[..., None]  # of a plan, input, weight, output and codes in boxes, multiprocessors, and arguments

    def __call__(
        self, input: Tensor, weight: Tensor, bias: Tensor | None, *settings: Any, relu=False, pool=False, codes=False
    ) -> tuple[Tensor, Tensor | None]:
        """Launch the kernel, with ReLU or with ReLU and a 2x2 pool if asked; return output and codes, or None.

        Settings: window, groups, algorithm. Without the name of a configuration, the one whose tiles fit best is taken.
        """
        window, groups, algorithm = settings
        refuse(self.name, self.capabilities, input, weight, window, groups)
        config = asked(algorithm)[1]
        configs = (config,) if config else self.configs
        (images, channels, height, width), outputs = input.shape, weight.shape[0]
        step = 2 if pool else 1
        rows, columns = (size // step for size in window.output_size(height, width))
        shape = images, outputs, rows, columns
        y = torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=torch.channels_last)
        code = torch.empty_like(y, dtype=torch.uint8) if codes else None
        count, output = multiprocessors(input.device), Output(images, outputs, rows * step, columns * step)
        plan = make_plan(configs, channels, window.size[0] * window.size[1], output, pool, count)
        config, box = plan.config, plan.box
        if plan.tiles:
            out = box.rows // step, box.columns // step, box.images, config.block_m
            boxed = (
                pixels(channels_last(input), *box, config.block_k),
                one_tap(channels_last(weight), config.block_m, config.block_k),
                pixels(y, *out),
                None if code is None else pixels(code, *out),
            )
            sizes = Sizes(channels, height, width, outputs, plan.tiles_h, plan.tiles_w, plan.blocks_co)
            flags = {"WINDOW": window, "RELU": relu, "POOL": pool, "BOX": box, "CONFIG": config}
            self.launch(plan, boxed, count, vector(bias), sizes, flags)
        format = conv_memory_format(input, weight)
        return y.contiguous(memory_format=format), None if code is None else code.contiguous(memory_format=format)


@triton.jit
def inside(start, BOX: tl.constexpr, LENGTH, KERNEL: tl.constexpr, PADDING: tl.constexpr, DILATION: tl.constexpr):
    """Return the first tap that reads inside the image anywhere in a box of an axis, and how many from there on do."""
    first = (tl.maximum(PADDING - start - (BOX - 1), 0) + DILATION - 1) // DILATION
    end = (tl.maximum(LENGTH + PADDING - start, 0) + DILATION - 1) // DILATION
    return first, tl.maximum(tl.minimum(end, KERNEL) - first, 0)


@triton.jit
def tile_start(tile, sizes, BOX: tl.constexpr, CONFIG: tl.constexpr):
    """Return row, column, image and output channel at which a tile begins; neighbours share their pixels."""
    box = tile // sizes.blocks_co
    w = box % sizes.tiles_w * BOX.columns
    h = box // sizes.tiles_w % sizes.tiles_h * BOX.rows
    return h, w, box // sizes.tiles_w // sizes.tiles_h * BOX.images, tile % sizes.blocks_co * CONFIG.block_m


@triton.jit
def taps(h, w, sizes, WINDOW: tl.constexpr, BOX: tl.constexpr):
    """Return the first row and column of a box's taps that read inside the image anywhere in it, and how many do."""
    r, rows = inside(h, BOX.rows, sizes.height, WINDOW.size[0], WINDOW.padding[0], WINDOW.dilation[0])
    s, columns = inside(w, BOX.columns, sizes.width, WINDOW.size[1], WINDOW.padding[1], WINDOW.dilation[1])
    return r, rows, s, columns


@triton.jit
def later_wins(earlier, later):
    """Whether the later of two places of a window wins: of equals the earlier, and the last NaN, as in torch."""
    return (later > earlier) | (later != later)


@triton.jit
def finish_pool(acc, DTYPE: tl.constexpr, BOX: tl.constexpr, BLOCK_CO: tl.constexpr):
    """Apply ReLU to a tile [BLOCK_CO, PIXELS] and pool it; return values and codes [BLOCK_CO, PIXELS / 4]."""
    value = acc.to(DTYPE).to(tl.float32)  # rounded as the stock convolution rounds, so that the same pixel wins
    window = tl.reshape(value, (BLOCK_CO, BOX.rows // 2, 2, BOX.columns // 2, 2, BOX.images))
    top, bottom = tl.split(tl.permute(window, (0, 1, 3, 5, 4, 2)))
    v0, v1 = tl.split(top)
    v2, v3 = tl.split(bottom)
    right, below = later_wins(v0, v1), later_wins(v2, v3)
    best_top, best_bottom = tl.where(right, v1, v0), tl.where(below, v3, v2)
    lower = later_wins(best_top, best_bottom)
    best = tl.where(lower, best_bottom, best_top)
    off = best <= 0.0
    code = tl.where(off, OFF, tl.where(lower, tl.where(below, 3, 2), tl.where(right, 1, 0)))
    y = tl.where(off, 0.0, best).to(DTYPE)
    shape: tl.constexpr = (BLOCK_CO, BOX.rows * BOX.columns * BOX.images // 4)
    return tl.reshape(y, shape), tl.reshape(code.to(tl.uint8), shape)
