"""Compile every Triton kernel, as the operators launch it on real layers, for GPUs that need not be there.

    python tests/codegen.py [--json] [a regular expression that a case's name holds]

prints a table of kernels, configurations, registers, spills, occupancy and least time, or the same for the test.

Runs the launchers on tensors of the meta device, with Triton's own specialization but a driver that only names its
GPU. Must run without TRITON_INTERPRET.

Every configuration is compiled, in bfloat16 and for sm_90 in float32: named after a colon, as one that is asked for.
sm_120, whose programs have least shared memory, gets those that are picked; float16 is compiled for sm_90 alone.
Float32 is multiplied in TF32, and without it in the cases that are named exact.
"""

import functools
import importlib
import json
import multiprocessing
import os
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import launching
import limits
import torch

from fastcnn.shapes import Window
from fastcnn.triton.convolution import hopper

CONFIGS = {
    name: [f"{name}:{config.name}" for config in importlib.import_module(f"fastcnn.triton.convolution.{stem}").CONFIGS]
    for name, stem in {
        "implicit_gemm": "implicit_gemm",
        "packed": "first_layers",
        "space_to_depth": "implicit_gemm",
        "dgrad": "dgrad",
        "wgrad": "wgrad",
    }.items()
}
SAME = Window((3, 3), (1, 1), (1, 1), (1, 1), False)
STRIDED = Window((11, 11), (4, 4), (2, 2), (1, 1), False)
POOL2, POOL3 = (Window((size, size), (2, 2), (0, 0), (1, 1), False) for size in (2, 3))
ARCHITECTURES = (80, 90, 100, 120)
ONLY = {"tma_kernel": (90, 100), "warp_specialized_kernel": (90,)}
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
LOAD = r"ld\.global(?:\.[a-z]\w*(?:::\w+)*)*?(?:\.v(\d))?\.b(\d+)"


def architectures(kernel: str, case: str) -> tuple[int, ...]:
    """Return those that a kernel is compiled for in a case."""
    if "fp16" in case or ("fp32" in case and ":" in case):
        return (90,)
    able = ONLY.get(kernel, ARCHITECTURES)
    return able[:3] if ":" in case or "**" in case else able


def layers() -> Iterator[tuple[str, str, str, tuple[Any, ...]]]:
    """Yield (case, stem, operator, arguments) for layers of AlexNet and VGG in both layouts and all dtypes."""
    odd = Window((3, 2), (2, 1), (1, 1), (2, 3), True)
    norm = (5, 1e-4, 0.75, 2.0)
    for dtype, format in (
        (torch.bfloat16, torch.channels_last),
        (torch.float32, torch.contiguous_format),
        (torch.float16, torch.channels_last),
    ):
        configs = CONFIGS if dtype != torch.float16 else {name: [] for name in CONFIGS}
        if dtype == torch.float32:  # in NCHW, which the larger tiles do not take
            configs = configs | {name: configs[name][-2:] for name in ("dgrad", "wgrad")}

        def new(*shape: int, dtype: torch.dtype = dtype, format: Any = format) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device="meta", memory_format=format)

        def codes(*shape: int, format: Any = format) -> torch.Tensor:
            return torch.empty(shape, dtype=torch.uint8, device="meta", memory_format=format)

        name = f"{TYPES[dtype]} {'NHWC' if format == torch.channels_last else 'NCHW'}"
        bias = torch.empty(64, dtype=dtype, device="meta")
        vgg, alexnet = new(16, 64, 224, 224), new(128, 96, 55, 55)
        same, valid = (SAME, 1), (STRIDED, 1)
        weight, first, mnist = new(64, 64, 3, 3), new(64, 3, 11, 11), new(32, 1, 3, 3)
        yield f"{name} 2x2/2", "max_pool", "max_pool_codes", (vgg, POOL2)
        yield f"{name} 3x3/2", "max_pool", "max_pool", (alexnet, POOL3)
        yield f"{name} dilated", "max_pool", "max_pool_codes", (alexnet, odd)
        yield (
            f"{name} 3x3/2",
            "max_pool",
            "max_pool_backward",
            (new(128, 96, 27, 27), codes(128, 96, 27, 27), 55, 55, POOL3),
        )
        yield (
            f"{name} dilated",
            "max_pool",
            "max_pool_backward",
            (new(128, 96, 27, 57), codes(128, 96, 27, 57), 55, 55, odd),
        )
        yield f"{name} 3x3", "conv_relu", "conv_relu", (vgg, weight, bias, *same, None)
        yield f"{name} 3x3", "conv_relu", "conv_relu_backward", (vgg, vgg, True)
        yield f"{name} 3x3, no bias", "conv_relu", "conv_relu_backward", (vgg, vgg, False)
        yield f"{name} 3x3", "conv_relu", "conv_relu", (vgg, weight, bias, *same, "implicit_gemm")
        yield f"{name} 11x11/4", "conv_relu", "conv_relu", (new(128, 3, 224, 224), first, bias, *valid, "implicit_gemm")
        if dtype == torch.float32:
            yield f"{name} 3x3, exact", "conv_relu", "conv_relu", (vgg, weight, bias, *same, "implicit_gemm")
            yield (
                f"{name} 3x3, exact",
                "conv_relu",
                "conv_relu",
                (new(64, 3, 224, 224), new(64, 3, 3, 3), bias, *same, "packed"),
            )
            yield f"{name} 3x3, exact", "dgrad", "dgrad", (vgg, vgg, vgg, weight, True, True, None, *same, None)
            yield f"{name} 3x3, exact", "wgrad", "wgrad", (vgg, vgg, vgg, weight, True, None, *same, None)
        yield (
            f"{name} 3x3, 1 channel",
            "conv_relu",
            "conv_relu",
            (new(100, 1, 28, 28), mnist, None, *same, "implicit_gemm"),
        )
        for config in configs["implicit_gemm"]:
            yield f"{name} 3x3, {config}", "conv_relu", "conv_relu", (vgg, weight, bias, *same, config)
        yield from first_layers(name, new, bias, configs)
        yield f"{name} 3x3, pool", "conv_relu_pool", "conv_relu_pool_codes", (vgg, weight, bias, *same, None, POOL2)
        yield f"{name} 3x3, pool", "conv_relu_pool", "conv_relu_pool", (vgg, weight, bias, *same, None, POOL2)
        half, half_codes = new(16, 64, 112, 112), codes(16, 64, 112, 112)
        yield (
            f"{name} 3x3, pool",
            "conv_relu_pool",
            "conv_relu_pool_backward",
            (half, half_codes, 224, 224, True, POOL2),
        )
        yield f"{name} size 5", "lrn", "lrn", (alexnet, *norm)
        yield f"{name} size 5", "lrn", "lrn_backward", (alexnet, alexnet, *norm)
        yield f"{name} size 5, beta 0.6", "lrn", "lrn_backward", (alexnet, alexnet, 5, 1e-4, 0.6, 2.0)
        yield f"{name} size 16", "lrn", "lrn", (alexnet, 16, 1e-4, 0.75, 2.0)
        yield f"{name} size 16", "lrn", "lrn_backward", (alexnet, alexnet, 16, 1e-4, 0.75, 2.0)
        pooled, pooled_codes = new(128, 96, 27, 27), codes(128, 96, 27, 27)
        yield f"{name} size 5, pool", "lrn_pool", "lrn_pool_codes", (alexnet, *norm, POOL3)
        yield f"{name} size 5, pool", "lrn_pool", "lrn_pool_backward", (pooled, pooled_codes, alexnet, *norm, POOL3)
        channels = torch.empty(64, device="meta")
        numbers = (*(channels,) * 4, 1e-5)
        yield f"{name} 64 channels", "bn_statistics", "bn_relu_statistics", (vgg,)
        yield f"{name} 64 channels", "bn_relu", "bn_relu", (vgg, *numbers)
        yield f"{name} 64 channels", "bn_relu", "bn_relu_backward", (vgg, vgg, *numbers, True)
        yield f"{name} 64 channels, 2x2", "bn_relu_pool", "bn_relu_pool_codes", (vgg, *numbers, POOL2)
        yield (
            f"{name} 64 channels, 2x2",
            "bn_relu_pool",
            "bn_relu_pool_backward",
            (half, half_codes, vgg, *numbers, True, POOL2),
        )
        yield f"{name} same shape", "add_relu", "add_relu", (vgg, vgg)
        yield f"{name} same shape", "add_relu", "add_relu_backward", (vgg, vgg)
        # on the gradient that takes most registers
        for config in (None, *configs["dgrad"]):
            case, config = f"{name} 3x3, pooled {config or ''}", config and config.partition(":")[2]
            yield case, "dgrad", "dgrad", (half, half_codes, vgg, weight, True, True, config, *same, POOL2)
        for config in (None, *configs["wgrad"]):
            case, config = f"{name} 3x3, pooled {config or ''}", config and config.partition(":")[2]
            yield case, "wgrad", "wgrad", (half, half_codes, vgg, weight, True, config, *same, POOL2)
        yield f"{name} 3x3, masked", "dgrad", "dgrad", (vgg, vgg, vgg, weight, True, True, None, *same, None)
        yield f"{name} 3x3, masked", "wgrad", "wgrad", (vgg, vgg, vgg, weight, True, None, *same, None)
        alexnet_first = (new(128, 64, 27, 27), codes(128, 64, 27, 27), new(128, 3, 224, 224), first)
        yield f"{name} 11x11/4, pooled", "wgrad", "wgrad", (*alexnet_first, True, None, *valid, POOL3)
        yield f"{name} 11x11/4, pooled", "dgrad", "dgrad", (*alexnet_first, False, False, None, *valid, POOL3)
        if dtype == torch.float16:
            continue
        wide = new(1, 64, 8192, 8192)
        yield f"{name} 2**32 elements", "max_pool", "max_pool_codes", (wide, POOL2)
        yield f"{name} 2**32 elements", "conv_relu", "conv_relu", (wide, weight, bias, *same, "implicit_gemm")
        yield f"{name} 2**32 elements", "dgrad", "dgrad", (wide, wide, wide, weight, True, True, None, *same, None)
        yield f"{name} 2**32 elements", "wgrad", "wgrad", (wide, wide, wide, weight, True, None, *same, None)


def planes() -> Iterator[tuple[str, str, str, tuple[Any, ...]]]:
    """Yield what goes by the vectors of NCHW's planes, in float16."""

    def new(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    same, pool = (SAME, 1), POOL2
    x, half, weight, bias = new(16, 64, 56, 56), new(16, 64, 28, 28), new(64, 64, 3, 3), new(64)
    yield "fp16 NCHW", "conv_relu", "conv_relu", (x, weight, bias, *same, None)
    yield "fp16 NCHW", "conv_relu", "conv_relu_backward", (x, x, True)
    yield "fp16 NCHW 2x2/2", "max_pool", "max_pool_codes", (x, pool)
    codes = new(*half.shape, dtype=torch.uint8)
    yield "fp16 NCHW 2x2/2", "max_pool", "max_pool_backward", (half, codes, 56, 56, pool)


def hopper_layers() -> Iterator[tuple[str, str, str, tuple[Any, ...]]]:
    """Yield the same for the Hopper convolutions: each network's boxes, then every configuration."""

    def convolution(
        images: int, channels: int, size: int, kernel: int, outputs: int, dtype: torch.dtype = torch.bfloat16
    ) -> tuple[Any, ...]:
        shapes = ((images, channels, size, size), (outputs, channels, kernel, kernel))
        x, weight = (
            torch.empty(shape, dtype=dtype, device="meta", memory_format=torch.channels_last) for shape in shapes
        )
        bias = torch.empty(outputs, dtype=dtype, device="meta")
        return x, weight, bias, Window((kernel, kernel), (1, 1), (kernel // 2, kernel // 2), (1, 1), False), 1

    pooled = {
        "vgg conv1_2, pool": convolution(64, 64, 224, 3, 64),
        "vgg conv3_3, pool": convolution(64, 256, 56, 3, 256),
        "vgg conv5_3, pool": convolution(64, 512, 14, 3, 512),
    }
    plain = {
        "vgg conv4_2": convolution(64, 512, 28, 3, 512),
        "alexnet 27x27": convolution(128, 64, 27, 5, 192),
        "alexnet 13x13": convolution(128, 384, 13, 3, 256),
    }
    for algorithm, configs in {"tma": hopper.TMA, "warp_specialized": hopper.WARP_SPECIALIZED}.items():
        for case, arguments in pooled.items():
            yield f"{case}, {algorithm}", "conv_relu_pool", "conv_relu_pool_codes", (*arguments, algorithm, POOL2)
        for case, arguments in plain.items():
            yield f"{case}, {algorithm}", "conv_relu", "conv_relu", (*arguments, algorithm)
        for dtype, name in ((torch.bfloat16, "bf16"), (torch.float16, "fp16")):
            arguments = convolution(64, 512, 14, 3, 512, dtype)
            for config in configs:
                how = f"{algorithm}:{config.name}"
                yield f"{name} {how}", "conv_relu_pool", "conv_relu_pool_codes", (*arguments, how, POOL2)


def first_layers(
    name: str, new: Any, bias: torch.Tensor, configs: dict[str, list[str]]
) -> Iterator[tuple[str, str, str, tuple[Any, ...]]]:
    """Yield the first layers of VGG and AlexNet, on bytes and on floats, and what else begins or ends a network."""
    same, strided = (SAME, 1), (STRIDED, 1)
    mean, seed = torch.empty(3, device="meta"), torch.empty(1, dtype=torch.int64, device="meta")
    floats, vgg, alexnet = new(64, 3, 224, 224), new(64, 3, 3, 3), new(64, 3, 11, 11)
    pictures = new(64, 3, 224, 224, dtype=torch.uint8)
    yield f"{name} bytes", "normalize", "normalize", (pictures, mean, mean, bias.dtype)
    convolutions = [
        *((each, vgg, same) for each in ("packed", *configs["packed"])),
        *((each, alexnet, strided) for each in ("packed", "space_to_depth", *configs["space_to_depth"])),
    ]
    for each, weight, settings in convolutions:
        case = f"{name} {weight.shape[2]}x{weight.shape[3]}, {each}"
        yield case, "conv_relu", "conv_relu", (floats, weight, bias, *settings, each)
        if not each.startswith("space_to_depth:"):  # whose product is the same
            joined = (pictures, mean, mean, weight, bias, *settings, each)
            yield f"{case}, bytes", "normalize_conv_relu", "normalize_conv_relu", joined
    if bias.dtype != torch.float16:
        large = new(1, 3, 32768, 32768)
        yield f"{name} 2**31 elements, packed", "conv_relu", "conv_relu", (large, vgg, bias, *same, "packed")
    rows, matrix = (torch.empty(shape, dtype=bias.dtype, device="meta") for shape in ((128, 9216), (4096, 9216)))
    y = torch.empty(128, 4096, dtype=bias.dtype, device="meta")
    yield f"{name} 9216 to 4096", "linear_relu_dropout", "linear_relu_dropout", (rows, matrix, None, seed, 0.5)
    yield f"{name} 9216 to 4096", "linear_relu_dropout", "linear_relu_dropout_backward", (y, y, 0.5, True)
    kinds = (bias.dtype, bias.dtype, torch.float32, torch.float32)
    parameters = [
        tuple(torch.empty(shape, dtype=each, device="meta") for each in kinds) for shape in ((4096, 9216), (4096,))
    ]
    yield f"{name} momentum", "sgd", "sgd", (parameters, 0.1, 0.9, 0.0, 5e-4, False, False, False)


def compile_all(part: str = "") -> Iterator[dict[str, Any]]:
    """Run the launchers of every layer whose case holds a regular expression; yield what each kernel needs."""
    driver, modules = launching.intercept(_take)
    _driver.append(driver)
    for case, stem, operator, arguments in (*layers(), *planes(), *hopper_layers()):
        if re.search(part, case):
            _todo.append(functools.partial(_compile, case, getattr(modules[stem], operator), arguments))
    with multiprocessing.get_context("fork").Pool(os.cpu_count()) as pool:
        for rows in pool.imap(_run, range(len(_todo))):
            yield from rows


# What processes inherit, as tensors of the meta device cannot be sent.
_todo: list[Callable[[], list[dict[str, Any]]]] = []
_driver: list[launching.Driver] = []
_case: list[str] = []
_rows: list[dict[str, Any]] = []


def _run(number: int) -> list[dict[str, Any]]:
    return _todo[number]()


def _compile(case: str, operator: Callable[..., Any], arguments: tuple[Any, ...]) -> list[dict[str, Any]]:
    _case[:] = [case]
    _rows.clear()
    torch.backends.cudnn.conv.fp32_precision = "ieee" if "exact" in case else "tf32"
    operator(*arguments)
    return list(_rows)


def _take(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Compile a launch for every architecture that its case is for, and note what the code needs."""
    name, given = kernel.__name__, dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    for architecture in architectures(name, _case[0]):
        _driver[0].architecture = architecture
        binary = kernel.warmup(*args, grid=grid, **kwargs)
        row = {"kernel": name, "case": _case[0], "architecture": architecture, **resources(binary)}
        needs = (row["warps"], row["registers"], row["shared"])
        least = limits.least_seconds(name, given, grid[0])
        row |= {"occupancy": limits.occupancy(architecture, *needs), "least_seconds": least}
        _rows.append(row)


def resources(binary: Any) -> dict[str, Any]:
    """Read registers, spills and shared memory of a compiled kernel, and which instructions it has."""
    found = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", launching.dump(binary, "-res-usage"))
    assert found
    ptx = binary.asm["ptx"]
    return {
        "registers": int(found[1]),
        "stack": int(found[2]) + int(found[3]),
        "shared": binary.metadata.shared,
        "warps": binary.metadata.num_warps,
        "wgmma": "wgmma.mma_async" in ptx,
        "tma": "cp.async.bulk.tensor" in ptx,
        "tensor_cores": "mma" in ptx,
        "load_bytes": max((int(n or 1) * int(b) // 8 for n, b in re.findall(LOAD, ptx)), default=0),
        "async_copy": "cp.async.cg" in ptx,
        "shared_operands": "ttg.dot_op" not in binary.asm["ttgir"],
    }


def main() -> None:
    """Compile everything; print a table, or JSON."""
    rows = list(compile_all(*[each for each in sys.argv[1:] if each != "--json"]))
    if "--json" in sys.argv:
        print(json.dumps(rows))
        return
    print(
        f"{'kernel':26} {'case':40} {'sm':>3} {'regs':>4} {'spills':>6} {'shared':>6} {'load':>4} {'filled':>6} "
        f"{'least µs':>8} tensor cores"
    )
    for row in rows:
        cores = "wgmma" if row["wgmma"] else "mma" if row["tensor_cores"] else ""
        least = f"{row['least_seconds'] * 1e6:.1f}" if row["architecture"] == 90 else ""
        print(
            f"{row['kernel']:26} {row['case']:40} {row['architecture']:3} {row['registers']:4} {row['stack']:6} "
            f"{row['shared']:6} {row['load_bytes']:4} {row['occupancy']:6.0%} {least:>8} {cores}"
            f"{' TMA' if row['tma'] else ''}"
        )
    print("spills: bytes of stack; load: widest load of a thread, bytes; filled: warps that run at once, of those that")
    print("fit; least: what an H200 needs at its measured rates, each tensor moved once, products at full rate")


if __name__ == "__main__":
    main()
