"""Issue time beside memory time of the memory-bound Triton kernels, on the networks' own layers.

    python tests/headline.py [--json] [a regular expression that a case's name holds]

Compiles each launch for sm_90 and counts its instructions (issue_slots.py); no GPU. A case is one operator: the times
of its kernels are summed. Must run without TRITON_INTERPRET.
"""

import functools
import json
import multiprocessing
import os
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import issue_slots
import launching
import limits
import planes
import stock_cases
import torch

from fastcnn.shapes import Window

TYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
FORMATS = {"NHWC": torch.channels_last, "NCHW": torch.contiguous_format}
NORM = (5, 1e-4, 0.75, 2.0)
WINDOWS = {side: Window((side, side), (2, 2), (0, 0), (1, 1), False) for side in (2, 3)}
POOL3 = WINDOWS[3]
POOLED = {name: (plane, WINDOWS[side]) for name, (plane, side) in planes.POOLED.items()}


def cases() -> Iterator[tuple[str, str, str, tuple[Any, ...]]]:
    """Yield (case, stem, operator, arguments)."""
    for type_name, dtype in TYPES.items():
        for layout, format in FORMATS.items():
            for name, stem, operator, arguments in operators(dtype, format):
                yield f"{type_name} {layout} {name}", stem, operator, arguments


def operators(dtype: torch.dtype, format: Any) -> Iterator[tuple[str, str, str, tuple[Any, ...]]]:
    """Yield the operators of one dtype and layout."""

    def new(images: int, channels: int, height: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty((images, channels, height, height), dtype=dtype, device="meta", memory_format=format)

    def bare(images: int, channels: int, height: int) -> tuple[Any, ...]:
        """Return a 1x1 convolution, whose output is what the epilogue reads."""
        weight = torch.empty((channels, 8, 1, 1), dtype=dtype, device="meta", memory_format=format)
        bias = torch.empty(channels, dtype=dtype, device="meta")
        return new(images, 8, height), weight, bias, Window((1, 1), (1, 1), (0, 0), (1, 1), False), 1, None

    def pooled(shape: tuple[int, int, int], pool: Any) -> tuple[torch.Tensor, torch.Tensor]:
        images, channels, height = shape
        size = pool.output_size(height, height)[0]
        return new(images, channels, size), new(images, channels, size, torch.uint8)

    for name, shape in planes.PLANES.items():
        yield f"bias+ReLU {name}", "conv_relu", "conv_relu", bare(*shape)
        yield f"bias+ReLU backward {name}", "conv_relu", "conv_relu_backward", (new(*shape), new(*shape), True)
    for name, (shape, pool) in POOLED.items():
        size = shape[2]
        yield f"bias+ReLU+pool {name}", "conv_relu_pool", "conv_relu_pool_codes", (*bare(*shape), pool)
        backward = (*pooled(shape, pool), size, size, True, pool)
        yield f"bias+ReLU+pool backward {name}", "conv_relu_pool", "conv_relu_pool_backward", backward
        yield f"max-pool {name}", "max_pool", "max_pool_codes", (new(*shape), pool)
        backward = (*pooled(shape, pool), size, size, pool)
        yield f"max-pool backward {name}", "max_pool", "max_pool_backward", backward
    for name, shape in planes.NORMED.items():
        x = new(*shape)
        yield f"LRN {name}", "lrn", "lrn", (x, *NORM)
        yield f"LRN backward {name}", "lrn", "lrn_backward", (new(*shape), x, *NORM)
        yield f"LRN+pool {name}", "lrn_pool", "lrn_pool_codes", (x, *NORM, POOL3)
        backward = (*pooled(shape, POOL3), x, *NORM, POOL3)
        yield f"LRN+pool backward {name}", "lrn_pool", "lrn_pool_backward", backward
    for name, shape in planes.BATCH_NORMED.items():
        x, numbers = new(*shape), (*(torch.empty(shape[1], device="meta") for _ in range(4)), 1e-5)
        yield f"batch norm statistics {name}", "bn_statistics", "bn_relu_statistics", (x,)
        yield f"batch norm+ReLU {name}", "bn_relu", "bn_relu", (x, *numbers)
        yield f"batch norm+ReLU backward {name}", "bn_relu", "bn_relu_backward", (new(*shape), x, *numbers, True)
    x = new(64, 256, 56)
    yield "add+ReLU ResNet 56", "add_relu", "add_relu", (x, new(64, 256, 56))
    yield "add+ReLU backward ResNet 56", "add_relu", "add_relu_backward", (x, new(64, 256, 56))


# Why a case takes more of the issue slots than AIM allows.
WHY = {
    r"NHWC.*pool (backward )?AlexNet": "nine places a window: two comparisons (NaN) and two selections each",
    r"NCHW.*pool (backward )?AlexNet|NCHW LRN\+pool": "odd rows of pixels: two bytes an access",
    r"NCHW.*pool (backward )?VGG": "rows of 28 or 14 leave vectors of four or two; the bias rounds as stock's",
    r"NCHW LRN": "odd planes: two bytes an access, and sixteen channels load eight more around them",
    r"NHWC LRN\+pool backward": "that of its pool",
    r"NCHW batch norm statistics VGG 28": "the sums in float64 at a program's end, after few tiles",
    r"NCHW bias.ReLU backward (AlexNet 13|VGG 14)": "a plane of 196 pixels or fewer fills a warp once",
}


def reason(case: str) -> str:
    """Return why a case takes longer to issue than AIM allows, or an empty string."""
    return next((why for pattern, why in WHY.items() if re.search(pattern, case)), "")


# How often a kernel's loops run, by its arguments; each inner loop before its outer one.
PASSES: dict[str, Callable[[dict[str, Any]], list[float]]] = {
    "masked_gradient_kernel": lambda given: [given["REPEAT"]],
    "relu_backward_planes_kernel": lambda given: [given["REPEAT"]],
    "unpool_quads_kernel": lambda given: [given["REPEAT"]],
    "unpool_pairs_kernel": lambda given: [given["REPEAT"]],
    "statistics_kernel": lambda given: [given["REPEAT"]],
    "bn_relu_kernel": lambda given: [given["REPEAT"]],
    "gradient_kernel": lambda given: [given["REPEAT"]],
    "max_pool_kernel": lambda given: [given["REPEAT"]],
    "sums_kernel": lambda given: [given["REPEAT"]],
    "merge_kernel": lambda given: 2 * [-(-given["ROWS"] // given["BLOCK_R"])],
    "merge_sums_kernel": lambda given: [-(-given["ROWS"] // given["BLOCK_R"])],
}


def unrolled(repeat: int) -> tuple[float, ...]:
    """Return the branches of relu_backward_planes_kernel where it does four passes at once, then two, then one."""
    fours = (0, repeat // 4) if repeat > 3 else (1,)
    return (0, 1, *fours, 0 if repeat % 4 > 1 else 1, *((0, 1) if repeat % 2 else (1,)))


def counted(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Compile a launch and count what it asks of the issue slots."""
    name, given = kernel.__name__, dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    binary = kernel.warmup(*args, grid=grid, **kwargs)
    usage = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", launching.dump(binary, "-res-usage"))
    assert usage
    code = next(code for _, code in issue_slots.functions(launching.dump(binary, "-sass")))
    passes, loops = PASSES[name](given) if name in PASSES else [], issue_slots.loops(issue_slots.body(code))
    if name == "relu_backward_planes_kernel" and len(loops) > 1:
        work = issue_slots.work_on_way(code, unrolled(given["REPEAT"]))
    else:
        work = issue_slots.work(code, passes)
    warps = binary.metadata.num_warps
    programs = functools.reduce(int.__mul__, grid)
    return {
        "kernel": name,
        "instructions": work.instructions,
        "loops": len(loops),
        "issue": issue_slots.issue_seconds(work.clocks, programs * warps),
        "memory": limits.least_seconds(name, given, programs),
        "registers": int(usage[1]),
        "stack": int(usage[2]) + int(usage[3]),
        "occupancy": limits.occupancy(90, warps, int(usage[1]), binary.metadata.shared),
        "loads": sorted(issue_slots.widths(code, "LDG").items()),
        "stores": sorted(issue_slots.widths(code, "STG").items()),
    }


_modules: dict[str, Any] = {}
_todo: list[tuple[str, str, str, tuple[Any, ...]]] = []
_rows: list[dict[str, Any]] = []


def run(number: int) -> dict[str, Any]:
    """Return a case's kernels and their sums."""
    case, stem, operator, arguments = _todo[number]
    _rows.clear()
    getattr(_modules[stem], operator)(*arguments)
    issue, memory = (sum(row[key] for row in _rows) for key in ("issue", "memory"))
    return {"case": case, "issue": issue, "memory": memory, "kernels": list(_rows)}


def count_all(part: str = "") -> list[dict[str, Any]]:
    """Count every case whose name holds a regular expression."""
    _, modules = launching.intercept(lambda *launch: _rows.append(counted(*launch)))
    _modules.update(modules)
    _todo[:] = [case for case in cases() if re.search(part, case[0])]
    with multiprocessing.get_context("fork").Pool(os.cpu_count()) as pool:
        return pool.map(run, range(len(_todo)), chunksize=1)


def accesses(widths: list[tuple[int, int]]) -> str:
    """Return how many accesses of each width a thread has, as 4x16 for four of sixteen bytes."""
    return " ".join(f"{count}x{width}" for width, count in widths)


def main() -> None:
    """Print the table, or JSON."""
    options = [each for each in sys.argv[1:] if each != "--json"]
    rows = count_all(*options)
    stock_cases.stand_beside(rows, "Triton")
    if "--json" in sys.argv:
        print(json.dumps(rows))
        return
    head = f"{'case':44} {'issue':>6} {'memory':>6} {'ratio':>5} {'copy':>5} {'stock':>6}"
    print(f"{head}  {'kernel':26} regs spill filled loads; stores")
    for row in rows:
        ratio, share = row["issue"] / row["memory"], issue_slots.share_of_copy(row["issue"], row["memory"])
        head = f"{row['case']:44} {row['issue'] * 1e6:6.1f} {row['memory'] * 1e6:6.1f} {ratio:5.2f} {share:5.0%}"
        head += f" {row['stock'] * 1e6:6.1f}" if row["stock"] else f" {'-':>6}"
        for kernel in row["kernels"]:
            print(
                f"{head:77}  {kernel['kernel']:26} {kernel['registers']:4} {kernel['stack']:5} "
                f"{kernel['occupancy']:6.0%} {accesses(kernel['loads'])}; {accesses(kernel['stores'])}"
                f" ({kernel['instructions']:.0f} instructions, {kernel['loops']} loops)"
            )
            head = ""
        if ratio > issue_slots.AIM:
            print(f"    over {issue_slots.AIM:.1f}: {reason(row['case']) or 'unexplained'}")
        if row["more"]:
            print(f"    more than stock's: {row['more']}")
    print("issue, memory: µs that an H200 takes to issue the instructions, and to move each tensor once; copy: the")
    print("smaller ceiling as a share of the copy bandwidth; stock: the issue time of its kernels; loads; stores:")
    print("how many a thread has, of so many bytes each")


if __name__ == "__main__":
    main()
