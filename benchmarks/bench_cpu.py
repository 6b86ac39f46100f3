"""Time every stage on the CPU against stock torch, in one run, and print the ratios.

Stock and ours take turns, so that a busy moment of the machine hits both; times are medians. `infer` is a call where
no gradient is asked for, `forward` one that keeps what a backward needs (codes), `train` a call with its backward. The
tiny cases measure what a call costs. Run with

    python benchmarks/bench_cpu.py [--dtype bfloat16] [--layout nchw] [--backend auto] [--only lrn] [--json file]
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import fastcnn
import fastcnn.functional as FF


class Case(NamedTuple):
    """One stage at one shape: the input, the weight's shape if it has one, and the settings."""

    network: str
    stage: str
    input: tuple[int, ...]
    weight: tuple[int, ...] | None
    settings: dict[str, Any]


LRN = {"size": 5, "alpha": 1e-4, "beta": 0.75, "k": 2.0}
POOL32 = {"pool_size": 3, "pool_stride": 2}
POOL2 = {"pool_size": 2}

CASES = (
    Case("AlexNet2012", "lrn", (16, 96, 55, 55), None, LRN),
    Case("AlexNet2012", "lrn", (16, 256, 27, 27), None, LRN),
    Case("AlexNet2012", "lrn_pool", (16, 96, 55, 55), None, LRN | POOL32),
    Case("AlexNet2012", "lrn_pool", (16, 256, 27, 27), None, LRN | POOL32),
    Case("VGG A-LRN", "lrn_pool", (2, 64, 224, 224), None, LRN | POOL2),
    Case("AlexNet2012", "max_pool", (16, 96, 55, 55), None, {"kernel_size": 3, "stride": 2}),
    Case("AlexNet", "max_pool", (16, 256, 13, 13), None, {"kernel_size": 3, "stride": 2}),
    Case("VGG", "max_pool", (4, 64, 224, 224), None, {"kernel_size": 2}),
    Case("VGG", "max_pool", (4, 512, 28, 28), None, {"kernel_size": 2}),
    Case("MNIST", "max_pool", (64, 32, 28, 28), None, {"kernel_size": 2}),
    Case("AlexNet", "conv_relu_pool", (16, 3, 224, 224), (64, 3, 11, 11), {"stride": 4, "padding": 2, **POOL32}),
    Case("AlexNet", "conv_relu_pool", (16, 64, 27, 27), (192, 64, 5, 5), {"padding": 2, **POOL32}),
    Case("AlexNet", "conv_relu_pool", (16, 256, 13, 13), (256, 256, 3, 3), {"padding": 1, **POOL32}),
    Case("VGG", "conv_relu_pool", (1, 64, 224, 224), (64, 64, 3, 3), {"padding": 1, **POOL2}),
    Case("VGG", "conv_relu_pool", (4, 512, 14, 14), (512, 512, 3, 3), {"padding": 1, **POOL2}),
    Case("MNIST", "conv_relu_pool", (64, 1, 28, 28), (32, 1, 3, 3), {"padding": 1, **POOL2}),
    Case("MNIST", "conv_relu_pool", (64, 32, 14, 14), (64, 32, 3, 3), {"padding": 1, **POOL2}),
    Case("AlexNet2012", "conv_relu", (16, 3, 227, 227), (96, 3, 11, 11), {"stride": 4}),
    Case("AlexNet", "conv_relu", (16, 192, 13, 13), (384, 192, 3, 3), {"padding": 1}),
    Case("VGG", "conv_relu", (1, 3, 224, 224), (64, 3, 3, 3), {"padding": 1}),
    Case("VGG", "conv_relu", (4, 256, 28, 28), (512, 256, 3, 3), {"padding": 1}),
    Case("AlexNet", "linear_relu", (16, 9216), (4096, 9216), {}),
    Case("small", "max_pool", (1, 32, 32, 32), None, {"kernel_size": 2}),
    Case("small", "conv_relu_pool", (1, 8, 32, 32), (8, 8, 3, 3), {"padding": 1, **POOL2}),
    Case("tiny", "max_pool", (1, 4, 8, 8), None, {"kernel_size": 2}),
    Case("tiny", "lrn", (1, 8, 4, 4), None, LRN),
    Case("tiny", "lrn_pool", (1, 8, 4, 4), None, LRN | POOL2),
    Case("tiny", "conv_relu", (1, 1, 8, 8), (4, 1, 3, 3), {"padding": 1}),
    Case("tiny", "conv_relu_pool", (1, 1, 8, 8), (4, 1, 3, 3), {"padding": 1, **POOL2}),
    Case("tiny", "linear_relu", (4, 8), (8, 8), {}),
)

LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
MODES = ("infer", "forward", "train")

OURS: dict[str, Callable[..., Tensor]] = {
    "lrn": FF.local_response_norm,
    "lrn_pool": FF.local_response_norm_max_pool2d,
    "max_pool": FF.max_pool2d,
    "conv_relu": FF.conv2d_relu,
    "conv_relu_pool": FF.conv2d_relu_max_pool2d,
    "linear_relu": FF.linear_relu,
}


def stock(stage: str, tensors: tuple[Tensor, ...], settings: dict[str, Any]) -> Tensor:
    """Run a stage as a stock model runs it, layer by layer."""
    pool = {key.removeprefix("pool_"): value for key, value in settings.items() if key.startswith("pool_")}
    own = {key: value for key, value in settings.items() if not key.startswith("pool_")}
    if stage == "max_pool":
        return F.max_pool2d(*tensors, **own)
    if stage.startswith("lrn"):  # which torch has in float32 alone on the CPU
        output = F.local_response_norm(tensors[0].float(), **own).to(tensors[0].dtype)
    else:
        product = F.linear if stage == "linear_relu" else F.conv2d
        output = F.relu(product(*tensors, **own), inplace=True)
    return F.max_pool2d(output, pool["size"], pool.get("stride")) if pool else output


def tensors_of(case: Case, dtype: torch.dtype, format: torch.memory_format, grad: bool) -> tuple[Tensor, ...]:
    """Return the stage's input, weight and bias. A network's first stage asks for no gradient of its input."""
    input = torch.randn(case.input).to(dtype)
    if input.dim() == 4:
        input = input.contiguous(memory_format=format)
    if case.weight is None:
        return (input.requires_grad_(grad),)
    fan_in = torch.Size(case.weight[1:]).numel()
    weight = (torch.randn(case.weight) * fan_in**-0.5).to(dtype)
    if weight.dim() == 4:
        weight = weight.contiguous(memory_format=format)
    bias = torch.randn(case.weight[0]).to(dtype)
    return (
        input.requires_grad_(grad and case.input[1] > 3),
        weight.requires_grad_(grad),
        bias.requires_grad_(grad),
    )


def take_turns(runs: list[Callable[[], object]], seconds: float) -> list[float]:
    """Return each run's median time in milliseconds, from rounds in which each runs once (or, if short, often)."""
    for run in runs:
        run()
    begin = time.perf_counter()
    runs[0]()
    repeat = max(1, int(0.002 / (time.perf_counter() - begin)))
    times: list[list[float]] = [[] for _ in runs]
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < 5:
        for run, seen in zip(runs, times, strict=True):
            begin = time.perf_counter()
            for _ in range(repeat):
                run()
            seen.append((time.perf_counter() - begin) / repeat * 1e3)
    return [statistics.median(seen) for seen in times]


def measure(case: Case, dtype: str, layout: str, seconds: float) -> dict[str, Any]:
    """Return one row of the table."""
    row: dict[str, Any] = {"network": case.network, "stage": case.stage, "input": list(case.input)}
    row |= {"weight": case.weight, "settings": case.settings}
    for mode in MODES:
        tensors = tensors_of(case, getattr(torch, dtype), LAYOUTS[layout], grad=mode != "infer")
        leaves = [tensor for tensor in tensors if tensor.requires_grad]

        def theirs(tensors: tuple[Tensor, ...] = tensors) -> Tensor:
            return stock(case.stage, tensors, case.settings)

        def ours(tensors: tuple[Tensor, ...] = tensors) -> Tensor:
            return OURS[case.stage](*tensors, **case.settings)

        cotangent = torch.randn_like(ours())

        def step(run: Callable[[], Tensor], leaves: list[Tensor] = leaves, cotangent: Tensor = cotangent) -> object:
            return torch.autograd.grad(run(), leaves, cotangent)

        both = [theirs, ours] if mode != "train" else [lambda: step(theirs), lambda: step(ours)]
        times = take_turns(both, seconds)
        row[mode] = {"stock_ms": times[0], "fastcnn_ms": times[1], "ratio": times[0] / times[1]}
    return row


def line_of(row: dict[str, Any]) -> str:
    """Return a row as the table shows it: milliseconds of stock and ours, and how many times ours is faster."""
    shape = "x".join(str(size) for size in row["input"])
    cells = [f"{row[m]['stock_ms']:>10.3f} {row[m]['fastcnn_ms']:>8.3f} {row[m]['ratio']:>5.1f}x" for m in MODES]
    return " ".join([f"{row['network']:<12} {row['stage']:<15} {shape:<16}", *cells])


def environment() -> dict[str, Any]:
    """Return what the times depend on."""
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return {
        "cpu": names[0] if names else platform.processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "fastcnn": fastcnn.__version__,
        "python": platform.python_version(),
        "command": "python " + " ".join(sys.argv),
    }


def main() -> None:
    """Print the table, and write it as JSON if asked."""
    parser = argparse.ArgumentParser(description="Time every stage on the CPU against stock torch.")
    dtypes = ["float32", "bfloat16", "float16"]
    parser.add_argument("--dtype", nargs="+", default=dtypes[:2], choices=dtypes)
    parser.add_argument("--layout", nargs="+", default=list(LAYOUTS), choices=list(LAYOUTS))
    parser.add_argument("--backend", nargs="+", default=["cpu"], choices=["cpu", "auto", "torch"])
    parser.add_argument("--only", help="a stage")
    parser.add_argument("--network", help="a network")
    parser.add_argument("--seconds", type=float, default=0.3, help="of a measurement")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    rows = []
    for backend, dtype, layout in product(arguments.backend, arguments.dtype, arguments.layout):
        print(f"\n{backend}, {dtype}, {layout}")
        print(f"{'network':<12} {'stage':<15} {'input':<16}" + "".join(f"{mode:>14}: stock, ours" for mode in MODES))
        for case in CASES:
            if arguments.only not in (None, case.stage) or arguments.network not in (None, case.network):
                continue
            with fastcnn.use_backend(backend):
                row = measure(case, dtype, layout, arguments.seconds)
            rows.append({"backend": backend, "dtype": dtype, "layout": layout} | row)
            print(line_of(row), flush=True)
    if arguments.json:
        text = json.dumps({"environment": environment(), "rows": rows}, indent=1)
        arguments.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
