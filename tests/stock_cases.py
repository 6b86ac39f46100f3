"""Stock torch's own CUDA kernels beside ours: what they ask of the issue slots for the headline cases' work.

    python tests/stock_cases.py [a regular expression that a case's name holds]

Stock torch runs each case on tensors of the meta device; a case is the sum of the kernels that stock_kernels.py has for
the operators it calls, found by name in the code of libtorch_cuda for sm_90. Left out: the convolution before its bias
(which `add_` adds to what cuDNN returns), and batch norm in float32, which torch gives to cuDNN.
"""

import functools
import hashlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import issue_slots
import launching
import limits
import planes
import torch
from stock_kernels import Kernel, launched, relu, statistics
from torch import Tensor
from torch.nn import functional as F

aten = torch.ops.aten
LIBRARY = Path(torch.__file__).parent / "lib" / "libtorch_cuda.so"
TYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
FORMATS = {"NHWC": torch.channels_last, "NCHW": torch.contiguous_format}


def cases() -> Iterator[tuple[str, list[Kernel]]]:
    """Yield each headline case that is counted, and its kernels."""
    for type_name, dtype in TYPES.items():
        for layout, format in FORMATS.items():
            for name, kernels in operators(dtype, format):
                yield f"{type_name} {layout} {name}", kernels


def operators(dtype: torch.dtype, format: Any) -> Iterator[tuple[str, list[Kernel]]]:
    """Yield those of one dtype and layout."""

    def new(images: int, channels: int, side: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty((images, channels, side, side), dtype=dtype, device="meta", memory_format=format)

    def biased(x: Tensor) -> list[Kernel]:
        bias = torch.empty(x.shape[1], dtype=dtype, device="meta").view(1, -1, 1, 1)
        return launched(lambda: F.relu(x.add_(bias)))  # as conv2d adds it to what cuDNN returns

    def unbiased(x: Tensor) -> list[Kernel]:
        return masked(x) + launched(lambda: x.sum((0, 2, 3)))

    def masked(x: Tensor) -> list[Kernel]:
        return launched(lambda: aten.threshold_backward(x, x, 0))

    def pooled(x: Tensor, side: int) -> list[Kernel]:
        return launched(lambda: F.max_pool2d(x, side, 2))

    def unpooled(x: Tensor, side: int) -> list[Kernel]:
        shape = (*x.shape[:2], (x.shape[2] - side) // 2 + 1)
        y, codes, two = new(*shape), new(*shape, torch.int64), [2, 2]
        backward = aten.max_pool2d_with_indices_backward
        return launched(lambda: backward(y, x, [side, side], two, [0, 0], [1, 1], False, codes))

    for name, shape in planes.PLANES.items():
        x = new(*shape)
        yield f"bias+ReLU {name}", biased(x)
        yield f"bias+ReLU backward {name}", unbiased(x)
    for name, (shape, side) in planes.POOLED.items():
        x = new(*shape)
        yield f"bias+ReLU+pool {name}", biased(x) + pooled(x, side)
        yield f"bias+ReLU+pool backward {name}", unpooled(x, side) + unbiased(x)
        yield f"max-pool {name}", pooled(x, side)
        yield f"max-pool backward {name}", unpooled(x, side)
    for name, shape in planes.NORMED.items():
        x = new(*shape).requires_grad_()
        y, grad = F.local_response_norm(x, 5, 1e-4, 0.75, 2.0), new(*shape)
        forward = launched(lambda x=x: F.local_response_norm(x, 5, 1e-4, 0.75, 2.0))
        backward = launched(lambda x=x, y=y, grad=grad: torch.autograd.grad(y, x, grad))
        yield f"LRN {name}", forward
        yield f"LRN backward {name}", backward
        yield f"LRN+pool {name}", forward + pooled(x, 3)
        yield f"LRN+pool backward {name}", unpooled(x, 3) + backward
    for name, shape in planes.BATCH_NORMED.items() if dtype != torch.float32 else ():
        x, numbers = new(*shape), [torch.empty(shape[1], device="meta") for _ in range(4)]
        normal = launched(lambda x=x, numbers=numbers: F.batch_norm(x, *numbers, training=False))
        weight, given = numbers[2], numbers[:2]
        arguments = (x, x, weight, *given, *given, True, 1e-5, [True, True, True])
        backward = launched(lambda arguments=arguments: aten.native_batch_norm_backward(*arguments))
        yield f"batch norm statistics {name}", statistics(x)
        yield f"batch norm+ReLU {name}", normal + relu(x, x)
        yield f"batch norm+ReLU backward {name}", masked(x) + backward
    x = new(64, 256, 56)
    yield "add+ReLU ResNet 56", launched(lambda: F.relu(x + x))
    yield "add+ReLU backward ResNet 56", masked(x)


def listings() -> dict[str, issue_slots.Code]:
    """Return the code of the cases' kernels by the regular expression of their name; it is kept for the next time."""
    names = sorted({kernel.name for _, kernels in cases() for kernel in kernels})
    key = f"{LIBRARY} {LIBRARY.stat().st_mtime_ns} {names}"
    kept = Path(tempfile.gettempdir()) / f"fastcnn_stock_{hashlib.sha256(key.encode()).hexdigest()[:16]}.sass"
    if not kept.exists():
        text = extracted(re.compile("|".join(names)))
        with tempfile.NamedTemporaryFile("w", dir=kept.parent, delete=False) as file:
            file.write(text)
        os.replace(file.name, kept)
    functions = list(issue_slots.functions(kept.read_text()))
    found = {pattern: [code for name, code in functions if re.search(pattern, name)] for pattern in names}
    return {pattern: code[0] for pattern, code in found.items() if len(code) == 1}


def extracted(wanted: re.Pattern[str]) -> str:
    """Return cuobjdump's listing of the library's kernels whose names are wanted."""
    with tempfile.TemporaryDirectory() as folder:
        command = [launching.CUOBJDUMP, "-xelf", "sm_90.cubin", str(LIBRARY)]
        subprocess.run(command, cwd=folder, capture_output=True, check=True)
        text = ""
        for path in sorted(Path(folder).iterdir()):
            names = {name.decode() for name in re.findall(rb"\.text\.(\w+)", path.read_bytes())}
            if found := sorted(filter(wanted.search, names)):
                command = [launching.CUOBJDUMP, "-sass", "-fun", ",".join(found), str(path)]
                text += subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return text


@functools.cache
def rows(wanted: str = "") -> dict[str, dict[str, Any]]:
    """Return issue and memory time of each case whose name holds a regular expression, and of its kernels.

    A case that has a kernel whose code is not found, or whose branches are not those that were read here, is left out.
    """
    if not LIBRARY.exists():
        return {}
    every = [(case, kernels) for case, kernels in cases() if re.search(wanted, case)]
    code, found = listings(), {}
    for case, kernels in every:
        try:
            work = [issue_slots.work_on_way(code[kernel.name], kernel.branches) for kernel in kernels]
        except (KeyError, ValueError):
            continue
        each = [
            {
                "kernel": kernel.name,
                "instructions": one.instructions,
                "issue": issue_slots.issue_seconds(one.clocks, kernel.warps),
                "memory": kernel.bytes / limits.COPY,
            }
            for kernel, one in zip(kernels, work, strict=True)
        ]
        found[case] = {"case": case, **{key: sum(one[key] for one in each) for key in ("issue", "memory")}}
        found[case]["kernels"] = each
    return found


# Why ours issue more than stock's, by family: the first whose pattern is found in the case's name.
MORE: dict[str, dict[str, str]] = {
    "CUDA": {
        "fp32 NHWC bias.ReLU backward": "at a fifth of the memory's time, as it adds up a bias gradient in one pass",
        "fp32 .* add.ReLU backward": "at a twelfth of the memory's time: 64-bit indices",
    },
    "Triton": {
        "NHWC bias.ReLU backward": "at under half of the memory's time, as it adds up a bias gradient in one pass",
        "fp32 .* add.ReLU backward": "at a tenth of the memory's time: a bound for each vector",
    },
}


def stand_beside(ours: list[dict[str, Any]], family: str) -> None:
    """Give each row stock's issue time as "stock", None where it is not counted, and why ours is more as "more"."""
    stock = rows()
    for row in ours:
        row["stock"] = stock[row["case"]]["issue"] if row["case"] in stock else None
        why = (why for pattern, why in MORE[family].items() if re.search(pattern, row["case"]))
        row["more"] = next(why, "unexplained") if row["stock"] and row["issue"] > row["stock"] else ""


def main() -> None:
    """Print the table."""
    for row in rows(*sys.argv[1:]).values():
        print(f"{row['case']:46} {row['issue'] * 1e6:7.1f} {row['memory'] * 1e6:7.1f}")
        for one in row["kernels"]:
            times = f"{one['issue'] * 1e6:7.1f} {one['memory'] * 1e6:7.1f}"
            print(f"{'':46} {times} {one['instructions']:9.0f} {one['kernel']}")


if __name__ == "__main__":
    main()
