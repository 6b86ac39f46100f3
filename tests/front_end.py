"""Run Triton's front end over every kernel as the operators launch it, for sizes from 1 up: no ptxas, no GPU.

    python tests/front_end.py [few | rest]  # prints what does not compile, for these SIZES or for all

Triton makes an argument that is 1 a plain number of Python, which lacks a tensor's methods: what compiles for large
images may not for small ones, and the interpreter does not show it.
"""

import json
import sys
from collections.abc import Iterator
from typing import Any

import torch
import triton
from launching import intercept

from fastcnn.shapes import Window

FORMATS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
PLACE = Window((1, 1), (1, 1), (0, 0), (1, 1), False)  # the kernel of a 1x1 convolution
# Images, channels, rows and columns: each is 1 by itself, beside others and beside none, in each layout; 80 channels
# and 42 x 40 pixels are more than a block.
SIZES = {
    ("few", "NCHW"): ((1, 1, 1, 1), (1, 80, 7, 1), (1, 1, 42, 40)),
    ("few", "NHWC"): ((1, 5, 1, 1), (3, 1, 7, 1)),
    ("rest", "NCHW"): ((1, 5, 5, 6), (3, 1, 1, 7), (2, 3, 2, 4)),
    ("rest", "NHWC"): ((1, 1, 5, 6), (1, 80, 1, 7), (3, 5, 42, 40)),
}

launched: set[str] = set()
begun: set[tuple[str, str]] = set()  # kernels and what Triton compiles each for


class Compiled(Exception):
    """The front end is through."""


def stop_after_front_end(*arguments: Any) -> tuple[str, str] | None:
    """Make every stage after the front end raise; without arguments, name this change of the stages."""

    def stop(*_: Any) -> None:
        raise Compiled

    if not arguments:
        return "front end", "front end"
    stages = arguments[1]
    stages.update(dict.fromkeys(stages, stop))
    return None


def is_known(*, key: str, fn: Any, **_: Any) -> bool:
    """Note what is compiled; whether it was before: sizes of one kind give the same code."""
    compiled = f"{fn.module}.{fn.name}", key
    known = compiled in begun
    begun.add(compiled)
    return known


def take(kernel: Any, grid: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    launched.add(kernel.__name__)
    try:
        kernel.warmup(*args, grid=grid, **kwargs)
    except Compiled:
        return


def launches(images: int, channels: int, height: int, width: int, format: Any) -> Iterator[tuple[str, str, Any]]:
    """Yield (stem, operator, arguments) of every launcher for one image size and layout."""

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        values = torch.empty(shape, dtype=dtype, device="meta")
        return values.to(memory_format=format) if len(shape) == 4 else values

    small = min(height, width) == 1
    sizes = ((1, 1), (1, 1), (0, 0)) if small else ((3, 2), (2, 2), (1, 0))
    pool = Window(*sizes, (1, 1), False)
    out = pool.output_size(height, width)
    x, bias = new(images, channels, height, width), new(channels)
    pooled = new(images, channels, *out)
    codes = new(*pooled.shape, dtype=torch.uint8)
    norm = (5, 1e-4, 0.75, 2.0)
    even = height % 2 == 0 and width % 4 == 0
    for length, stride in ((1, 3), *([(2, 2)] * even)):
        other = Window((length, length), (stride, stride), (0, 0), (1, 1), False)
        size = other.output_size(height, width)
        grad, winners = new(images, channels, *size), new(images, channels, *size, dtype=torch.uint8)
        yield "max_pool", "max_pool_codes", (x, other)
        yield "conv_relu_pool", "conv_relu_pool_backward", (grad, winners, height, width, True, other)
    yield "max_pool", "max_pool_codes", (x, pool)
    yield "max_pool", "max_pool_backward", (pooled, codes, height, width, pool)
    yield "conv_relu_pool", "conv_relu_pool_backward", (pooled, codes, height, width, True, pool)
    yield "conv_relu", "conv_relu_backward", (x, x, True)
    yield "conv_relu", "conv_relu_backward", (x, x, False)
    yield "lrn", "lrn", (x, *norm)
    yield "lrn", "lrn_backward", (x, x, *norm)
    yield "lrn", "lrn_backward", (x, x, 1, 1e-4, 0.5, 2.0)
    yield "lrn_pool", "lrn_pool_codes", (x, *norm, pool)
    yield "lrn_pool", "lrn_pool_backward", (pooled, codes, x, *norm, pool)
    yield "add_relu", "add_relu", (x, x)
    yield "add_relu", "add_relu_backward", (x, x)
    yield "bn_statistics", "bn_relu_statistics", (x,)
    for numbers in ((bias, bias, bias, bias, 1e-5), (bias, bias, None, None, 1e-5)):
        yield "bn_relu", "bn_relu", (x, *numbers)
        yield "bn_relu", "bn_relu_backward", (x, x, *numbers, True)
        yield "bn_relu_pool", "bn_relu_pool_codes", (x, *numbers, pool)
        yield "bn_relu_pool", "bn_relu_pool_backward", (pooled, codes, x, *numbers, True, pool)
    mean, seed = new(channels), torch.empty(1, dtype=torch.int64, device="meta")
    bytes_ = new(*x.shape, dtype=torch.uint8)
    yield "normalize", "normalize", (bytes_, mean, mean, torch.bfloat16)
    for outputs, groups in ((1, 1), (16, 1), (2 * channels, channels)):
        weight, parameters = new(outputs, channels // groups, 1, 1), new(outputs)
        settings, output = (PLACE, groups), new(images, outputs, height, width)
        yield "conv_relu", "conv_relu", (x, weight, parameters, *settings, None)
        yield "conv_relu", "conv_relu", (x, weight, parameters, *settings, "implicit_gemm")
        yield "conv_relu_pool", "conv_relu_pool_codes", (x, weight, parameters, *settings, None, pool)
        yield "dgrad", "dgrad", (output, output, x, weight, True, True, None, *settings, None)
        yield "wgrad", "wgrad", (output, output, x, weight, True, None, *settings, None)
        grad = new(images, outputs, *out), new(images, outputs, *out, dtype=torch.uint8)
        yield "dgrad", "dgrad", (*grad, x, weight, False, False, None, *settings, pool)
        yield "wgrad", "wgrad", (*grad, x, weight, False, None, *settings, pool)
        if channels <= 4 and groups == 1:
            yield "conv_relu", "conv_relu", (x, weight, parameters, *settings, "packed")
            joined = (bytes_, mean, mean, weight, parameters, *settings, "packed")
            yield "normalize_conv_relu", "normalize_conv_relu", joined
            strided = (PLACE._replace(stride=(2, 2)), 1)
            yield "conv_relu", "conv_relu", (x, weight, parameters, *strided, "space_to_depth")
            joined = (bytes_, mean, mean, weight, parameters, *strided, "space_to_depth")
            yield "normalize_conv_relu", "normalize_conv_relu", joined
    yield "linear_relu_dropout", "linear_relu_dropout", (new(images, channels), new(width, channels), None, seed, 0.5)
    rows = new(images, channels)
    yield "linear_relu_dropout", "linear_relu_dropout_backward", (rows, rows, 0.5, True)
    if channels % 8 == 0:
        half = new(*x.shape, dtype=torch.bfloat16)
        weight = new(16, channels, 1, 1, dtype=torch.bfloat16)
        for algorithm in ("tma", "warp_specialized"):
            yield "conv_relu", "conv_relu", (half, weight, None, PLACE, 1, algorithm)
    for master in (False, True):
        weight = new(channels, height, dtype=torch.bfloat16 if master else torch.float32)
        copy = new(channels, height) if master else weight
        for count in (1, 3):
            parameters = [(weight, weight, copy, new(channels, height))] * count
            yield "sgd", "sgd", (parameters, 0.1, 0.9, 0.0, 5e-4, False, False, False)


def failures(shares: list[str]) -> Iterator[str]:
    """Compile; yield each case that does not, with the error's last line."""
    triton.knobs.runtime.add_stages_inspection_hook = stop_after_front_end
    triton.knobs.runtime.jit_cache_hook = is_known
    _, modules = intercept(take)
    for layout, size in ((key[1], size) for key, sizes in SIZES.items() if key[0] in shares for size in sizes):
        for stem, operator, arguments in launches(*size, FORMATS[layout]):
            try:
                getattr(modules[stem], operator)(*arguments)
            except Exception as error:
                yield f"{operator} of {size} {layout}: {str(error).strip().splitlines()[-1]}"


def main() -> None:
    """Print what does not compile, as JSON."""
    found = list(failures(sys.argv[1:] or ["few", "rest"]))
    print(json.dumps({"failures": found, "kernels": sorted(launched)}))


if __name__ == "__main__":
    main()
