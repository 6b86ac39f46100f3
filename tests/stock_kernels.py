"""Stock torch's own CUDA kernels, from its library: what they ask of the issue slots for the headline cases' work.

Found by name in the sm_90 code of libtorch_cuda; where that cannot be had there are no rows.
"""

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
    elements: int  # computed in all, one by a thread and pass of its last loop
    moved: tuple[float, float]  # bytes for each: the elements' own, and others


POOLED = 128 * 64 * 27 * 27
KERNELS = (
    # The loops: where a window starts inside the image (rows, columns), its columns, its rows, a thread's outputs.
    Stock("NCHW max-pool AlexNet 55", "max_pool_forward_nchwI{type}iE", (1, 1, 3, 3, 1), POOLED, (5.15, 8.0)),
)


def kernels() -> dict[str, issue_slots.Code]:
    """Return the code of each function of the library's files that hold any of the kernels."""
    found: dict[str, issue_slots.Code] = {}
    names = [stock.name.partition("I{")[0].encode() for stock in KERNELS]
    with tempfile.TemporaryDirectory() as folder:
        command = [launching.CUOBJDUMP, "-xelf", "sm_90.cubin", str(LIBRARY)]
        subprocess.run(command, cwd=folder, capture_output=True, check=True)
        for path in Path(folder).iterdir():
            content = path.read_bytes()
            if any(name in content for name in names):
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
        for type_name, (mangled, size) in TYPES.items():
            code = next((code for name, code in found.items() if stock.name.format(type=mangled) in name), None)
            if code is None:
                continue
            work = issue_slots.work(code, stock.passes)
            memory = stock.elements * (stock.moved[0] * size + stock.moved[1]) / limits.COPY
            yield {
                "case": f"{type_name} {stock.case}",
                "issue": issue_slots.issue_seconds(work.clocks, stock.elements / 32),
                "memory": memory,
                "instructions": work.instructions,
                "loads": sorted(issue_slots.widths(code, "LDG").items()),
                "stores": sorted(issue_slots.widths(code, "STG").items()),
            }


if __name__ == "__main__":
    for row in rows():
        print(f"stock {row['case']:40} {row['issue'] * 1e6:6.1f} {row['memory'] * 1e6:6.1f} {row['instructions']:.0f}")
