"""Stock torch's own CUDA kernels, from its library: what they ask of the issue slots for the headline cases' work.

Found by name in the sm_90 code of libtorch_cuda; where that cannot be had there are no rows.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import issue_slots
import launching
import limits
import torch

LIBRARY = Path(torch.__file__).parent / "lib" / "libtorch_cuda.so"
TYPES = {"bf16": ("N3c108BFloat16E", 2), "fp32": ("f", 4)}


class Stock(NamedTuple):
    """A kernel: the case of ours that does the same, its mangled name, and what a thread does."""

    case: str
    name: str  # with the element's type as {type}
    passes: tuple[float, ...]  # of its loops, as issue_slots.work takes them
    outputs: tuple[int, int]  # values that a thread computes, in bfloat16 and in float32
    elements: int  # computed in all
    moved: tuple[float, float]  # bytes for each: the elements' own, and others


POOLED = 128 * 64 * 27 * 27
MASKED = 64 * 64 * 224 * 224
KERNELS = (
    # The loops: where a window starts inside the image, its columns, its rows, and the outputs of a thread.
    Stock("NCHW max-pool AlexNet 55", r"max_pool_forward_nchwI{type}iE", (1, 1, 3, 3, 1), (1, 1), POOLED, (5.15, 8.0)),
    Stock(
        "NCHW bias+ReLU backward VGG 224",
        r"vectorized_elementwise_kernelILi{vector}ENS0_13BinaryFunctorI{type}.*threshold_kernel_impl.*",
        (),
        (8, 4),
        MASKED,
        (3.0, 0.0),
    ),
)


def kernels() -> dict[str, issue_slots.Code]:
    """Return the code of each function of the library's files that hold any of the kernels."""
    found: dict[str, issue_slots.Code] = {}
    plain = [re.split(r"I\{|ILi", stock.name)[0].encode() for stock in KERNELS] + [b"threshold_kernel_impl"]
    with tempfile.TemporaryDirectory() as folder:
        command = [launching.CUOBJDUMP, "-xelf", "sm_90.cubin", str(LIBRARY)]
        subprocess.run(command, cwd=folder, capture_output=True, check=True)
        for path in Path(folder).iterdir():
            content = path.read_bytes()
            if any(part in content for part in (plain[0], plain[-1])):
                command = [launching.CUOBJDUMP, "-sass", str(path)]
                listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
                found |= dict(issue_slots.functions(listing))
    return found


def rows() -> Iterator[dict[str, Any]]:
    """Yield the stock kernels' rows, as headline.py prints them."""
    if not LIBRARY.exists():
        return
    found = kernels()
    for stock in KERNELS:
        for i, (type_name, (mangled, size)) in enumerate(TYPES.items()):
            pattern = stock.name.format(type=mangled, vector=stock.outputs[i])
            code = next((code for name, code in found.items() if re.search(pattern, name)), None)
            if code is None:
                continue
            work = issue_slots.work(code, stock.passes)
            warps = stock.elements / stock.outputs[i] / 32
            memory = stock.elements * (stock.moved[0] * size + stock.moved[1]) / limits.COPY
            yield {
                "case": f"{type_name} {stock.case}",
                "issue": issue_slots.issue_seconds(work.clocks, warps),
                "memory": memory,
                "instructions": work.instructions,
                "loads": sorted(issue_slots.widths(code, "LDG").items()),
                "stores": sorted(issue_slots.widths(code, "STG").items()),
            }


if __name__ == "__main__":
    for row in rows():
        print(f"stock {row['case']:40} {row['issue'] * 1e6:6.1f} {row['memory'] * 1e6:6.1f} {row['instructions']:.0f}")
