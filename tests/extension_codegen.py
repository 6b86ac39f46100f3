"""What nvcc made of every CUDA kernel in the built extension, without a GPU.

    python tests/extension_codegen.py  # a table: kernel, architecture, registers, stack, instructions

Reads fastcnn/_C itself with cuobjdump: what is shown is what would run.
"""

import functools
import os
import re
import subprocess
from collections import Counter
from importlib.util import find_spec
from typing import Any

import triton

CUOBJDUMP = os.path.join(os.path.dirname(triton.__file__), "backends/nvidia/bin/cuobjdump")
# Loads and stores of 16 bytes, asynchronous copies, loads of matrices, matrix products.
INSTRUCTIONS = ("LDG.E.128", "STG.E.128", "LDGSTS", "LDSM", "HMMA")


def extension() -> str:
    """Return the path of the extension that is installed, or an empty string."""
    found = find_spec("fastcnn._C")
    return found.origin if found and found.origin else ""


def dump(*options: str, binary: str = "") -> str:
    """Return cuobjdump's text of the extension or another file, with kernels' names as they are written in C++."""
    return _dump(binary or extension(), *options)


@functools.cache
def _dump(binary: str, *options: str) -> str:
    text = subprocess.run([CUOBJDUMP, *options, binary], capture_output=True, text=True, check=True).stdout
    return subprocess.run(["c++filt"], input=text, capture_output=True, text=True, check=True).stdout


def resources(binary: str = "") -> list[dict[str, Any]]:
    """Return registers, stack and local memory of every kernel for every architecture."""
    rows, architecture = [], ""
    for part in re.split(r"^Fatbin elf code:", dump("-res-usage", binary=binary), flags=re.MULTILINE)[1:]:
        architecture = re.search(r"arch = (sm_\w+)", part)[1]
        for name, registers, stack, local in re.findall(
            r"Function (.+):\n\s+REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", part
        ):
            rows.append(
                {
                    "kernel": kernel_name(name),
                    "architecture": architecture,
                    "registers": int(registers),
                    "stack": int(stack) + int(local),
                }
            )
    return rows


def instructions(architecture: str) -> dict[str, Counter[str]]:
    """Return how often each of INSTRUCTIONS stands in every kernel's code for an architecture."""
    counts = {}
    for part in re.split(r"^\s*Function : ", dump("-sass", "-arch", architecture), flags=re.MULTILINE)[1:]:
        name, code = part.split("\n", 1)
        counts[kernel_name(name)] = Counter({each: len(re.findall(re.escape(each), code)) for each in INSTRUCTIONS})
    return counts


def kernel_name(demangled: str) -> str:
    """Return the kernel's name and template arguments, without namespaces and parameters."""
    name = re.sub(r"\(anonymous namespace\)::|\w+::", "", demangled.strip().removeprefix("void "))
    depth = 0
    for i, letter in enumerate(name):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            return name[:i]
    return name


def main() -> None:
    """Print the table."""
    found = {row["architecture"] for row in resources()}
    code = {architecture: instructions(architecture) for architecture in sorted(found)}
    print(f"{'kernel':60} {'sm':>8} {'regs':>4} {'stack':>5}  " + "  ".join(INSTRUCTIONS))
    for row in sorted(resources(), key=lambda row: (row["kernel"], row["architecture"])):
        counts = code[row["architecture"]].get(row["kernel"], Counter())
        cells = "  ".join(f"{counts[each] or '':>{len(each)}}" for each in INSTRUCTIONS)
        print(f"{row['kernel'][:60]:60} {row['architecture']:>8} {row['registers']:4} {row['stack']:5}  {cells}")


if __name__ == "__main__":
    main()
