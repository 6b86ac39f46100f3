"""Compile every Triton kernel, as the operators launch it on real layers, for GPUs that need not be there.

    python tests/codegen.py            # a table: kernel, configuration, registers, spills, shared memory
    python tests/codegen.py --json     # the same for the test

Runs the launchers on tensors of the meta device with the kernels replaced by recorders, then compiles what was
recorded. Must run without TRITON_INTERPRET.
"""

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

STEMS = ("max_pool", "conv_relu", "conv_relu_pool", "lrn", "lrn_pool", "linear_relu")
ARCHITECTURES = (80, 90, 100)
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.uint8: "u8"}
LOAD = r"ld\.global(?:\.[a-z]\w*(?:::\w+)*)*?(?:\.v(\d))?\.b(\d+)"
CUOBJDUMP = os.path.join(os.path.dirname(triton.__file__), "backends/nvidia/bin/cuobjdump")


class Launch(NamedTuple):
    """One recorded kernel launch."""

    case: str
    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, int]


class Recorder:
    """Stands in for a kernel: remembers what it is launched with."""

    def __init__(self, kernel: Any, launches: list[tuple[Any, tuple[Any, ...], dict[str, Any]]]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **kwargs: self.launches.append((self.kernel, args, kwargs))


def layers() -> Iterator[tuple[str, str, str, tuple[Any, ...]]]:
    """Yield (case, stem, operator, arguments) for layers of AlexNet and VGG in both layouts and two dtypes."""
    pool3 = ([3, 3], [2, 2], [0, 0], [1, 1], False)
    pool2 = ([2, 2], [2, 2], [0, 0], [1, 1], False)
    odd = ([3, 2], [2, 1], [1, 1], [2, 3], True)
    norm = (5, 1e-4, 0.75, 2.0)
    for dtype, format in ((torch.bfloat16, torch.channels_last), (torch.float32, torch.contiguous_format)):

        def new(*shape: int, dtype: torch.dtype = dtype, format: Any = format) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device="meta", memory_format=format)

        def codes(*shape: int, format: Any = format) -> torch.Tensor:
            return torch.empty(shape, dtype=torch.uint8, device="meta", memory_format=format)

        name = f"{TYPES[dtype]} {'NHWC' if format == torch.channels_last else 'NCHW'}"
        bias = torch.empty(64, dtype=dtype, device="meta")
        vgg, alexnet = new(16, 64, 224, 224), new(128, 96, 55, 55)
        same, valid = ([1, 1], [1, 1], [1, 1], 1), ([4, 4], [2, 2], [1, 1], 1)
        weight, first, mnist = new(64, 64, 3, 3), new(64, 3, 11, 11), new(32, 1, 3, 3)
        yield f"{name} 2x2/2", "max_pool", "max_pool_codes", (vgg, *pool2)
        yield f"{name} 3x3/2", "max_pool", "max_pool", (alexnet, *pool3)
        yield f"{name} dilated", "max_pool", "max_pool_codes", (alexnet, *odd)
        yield (
            f"{name} 3x3/2",
            "max_pool",
            "max_pool_backward",
            (new(128, 96, 27, 27), codes(128, 96, 27, 27), 55, 55, *pool3),
        )
        yield (
            f"{name} dilated",
            "max_pool",
            "max_pool_backward",
            (new(128, 96, 27, 57), codes(128, 96, 27, 57), 55, 55, *odd),
        )
        yield f"{name} 3x3", "conv_relu", "conv_relu", (vgg, weight, bias, *same, None)
        yield f"{name} 3x3", "conv_relu", "conv_relu_backward", (vgg, vgg, True)
        yield f"{name} 3x3, no bias", "conv_relu", "conv_relu_backward", (vgg, vgg, False)
        yield f"{name} 3x3", "conv_relu", "conv_relu", (vgg, weight, bias, *same, "implicit_gemm")
        yield f"{name} 11x11/4", "conv_relu", "conv_relu", (new(128, 3, 224, 224), first, bias, *valid, "implicit_gemm")
        yield (
            f"{name} 3x3, 1 channel",
            "conv_relu",
            "conv_relu",
            (new(100, 1, 28, 28), mnist, None, *same, "implicit_gemm"),
        )
        yield f"{name} 3x3, pool", "conv_relu_pool", "conv_relu_pool_codes", (vgg, weight, bias, *same, None, *pool2)
        yield f"{name} 3x3, pool", "conv_relu_pool", "conv_relu_pool", (vgg, weight, bias, *same, None, *pool2)
        half, half_codes = new(16, 64, 112, 112), codes(16, 64, 112, 112)
        yield (
            f"{name} 3x3, pool",
            "conv_relu_pool",
            "conv_relu_pool_backward",
            (half, half_codes, 224, 224, True, *pool2),
        )
        yield f"{name} size 5", "lrn", "lrn", (alexnet, *norm)
        yield f"{name} size 5", "lrn", "lrn_backward", (alexnet, alexnet, *norm)
        yield f"{name} size 5, beta 0.6", "lrn", "lrn_backward", (alexnet, alexnet, 5, 1e-4, 0.6, 2.0)
        yield f"{name} size 16", "lrn", "lrn_backward", (alexnet, alexnet, 16, 1e-4, 0.75, 2.0)
        pooled, pooled_codes = new(128, 96, 27, 27), codes(128, 96, 27, 27)
        yield f"{name} size 5, pool", "lrn_pool", "lrn_pool_codes", (alexnet, *norm, *pool3)
        yield f"{name} size 5, pool", "lrn_pool", "lrn_pool_backward", (pooled, pooled_codes, alexnet, *norm, *pool3)
        wide = new(1, 64, 8192, 8192)
        yield f"{name} 2**32 elements", "max_pool", "max_pool_codes", (wide, *pool2)
        yield f"{name} 2**32 elements", "conv_relu", "conv_relu", (wide, weight, bias, *same, "implicit_gemm")


def record() -> list[Launch]:
    """Run the launchers of every layer with recorders in the kernels' place."""
    modules = [importlib.import_module(f"fastcnn.triton.{stem}") for stem in STEMS]
    raw: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
    for module in modules:
        for name, value in vars(module).copy().items():
            if name.endswith("_kernel"):
                setattr(module, name, Recorder(value, raw))
    launches = []
    for case, stem, operator, arguments in layers():
        getattr(importlib.import_module(f"fastcnn.triton.{stem}"), operator)(*arguments)
        kernel, args, kwargs = raw.pop()
        options = {key: kwargs.pop(key) for key in ("num_warps", "num_stages") if key in kwargs}
        launches.append(Launch(case, kernel, dict(zip(kernel.arg_names, args)) | kwargs, options))
    return launches


def compile_for(launch: Launch, architecture: int) -> dict[str, Any]:
    """Compile a launch, specialised as Triton's own launcher would, and read its resources."""
    signature, constants, attributes = {}, {}, {}
    for index, name in enumerate(launch.kernel.arg_names):
        value = launch.arguments[name]
        constant = launch.kernel.params[index].is_constexpr or value is None or (type(value) is int and value == 1)
        if constant:
            signature[name], constants[(index,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name], attributes[(index,)] = "*" + TYPES[value.dtype], [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=launch.options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", usage)
    assert found, usage
    ptx = compiled.asm["ptx"]
    return {
        "kernel": launch.kernel.__name__,
        "case": launch.case,
        "architecture": architecture,
        "registers": int(found[1]),
        "stack": int(found[2]) + int(found[3]),
        "shared": compiled.metadata.shared,
        "wgmma": "wgmma.mma_async" in ptx,
        "tensor_cores": "mma" in ptx,
        "load_bytes": max((int(n or 1) * int(b) // 8 for n, b in re.findall(LOAD, ptx)), default=0),
        "async_copy": "cp.async.cg" in ptx,
    }


def main() -> None:
    """Compile everything; print a table, or JSON."""
    rows = [compile_for(launch, architecture) for launch in record() for architecture in ARCHITECTURES]
    if "--json" in sys.argv:
        print(json.dumps(rows))
        return
    print(f"{'kernel':26} {'case':28} {'sm':>3} {'regs':>4} {'stack':>5} {'shared':>6} {'load':>4} tensor cores")
    for row in rows:
        cores = "wgmma" if row["wgmma"] else "mma" if row["tensor_cores"] else ""
        print(
            f"{row['kernel']:26} {row['case']:28} {row['architecture']:3} {row['registers']:4} {row['stack']:5} "
            f"{row['shared']:6} {row['load_bytes']:4} {cores}"
        )


if __name__ == "__main__":
    main()
