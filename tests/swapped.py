"""Run an example as it stands, or with stock layers in place of fastcnn's, and count the fused operators that ran.

    torchrun --nproc-per-node 2 tests/swapped.py FOLDER train_distributed --fsdp

does so in several processes: each writes what `main` returned and what it counted to FOLDER/<rank>.json.
"""

import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

import fastcnn

EXAMPLES = Path(__file__).parents[1] / "examples"
IMPORT = re.compile(r"^from fastcnn import", flags=re.MULTILINE)
FUSE = re.compile(r"^import fastcnn\n|\bfastcnn\.fuse(?=\()", flags=re.MULTILINE)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Kernels that serve every stage there; `auto` (the stock layers, where nothing is measured) without any.
BACKENDS = {"cuda": "triton", "cpu": "cpu" if fastcnn.backends()["cpu"].available else "auto"}

# The stages of two networks, and how often each runs in one pass.
ALEXNET = {"conv_relu_pool": 3, "conv_relu": 2, "linear_relu": 2}
SMALL_NET = {"conv_relu": 2, "lrn_pool": 1, "conv_relu_pool": 1, "linear_relu": 1}


def exact_products() -> AbstractContextManager[None]:
    """Multiply float32 as float32 on GPUs: TF32 would hide what is compared."""
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=False) if DEVICE == "cuda" else nullcontext()


def passes(network: dict[str, int], forward: int, backward: int) -> dict[str, int]:
    """Return how often which operator runs in so many passes through a network."""
    there = {stage: times * forward for stage, times in network.items()}
    back = {f"{stage}_backward": times * backward for stage, times in network.items() if backward}
    return there | back


def as_stock(source: str) -> str:
    """Undo what a script had to change: the import of the model, or `import fastcnn` and one call of `fuse`."""
    stock, imports = IMPORT.subn("from torchvision.models import", source)
    stock, fuses = FUSE.subn("", stock)
    assert (imports, fuses) in ((1, 0), (0, 2)), "an example changes one import, or calls fuse once"
    return stock


def load(name: str, stock: bool = False) -> ModuleType:
    """Execute an example's file, which does not call its `main`."""
    if str(EXAMPLES) not in sys.path:
        sys.path.insert(0, str(EXAMPLES))  # as Python does for a script
    path = EXAMPLES / f"{name}.py"
    source = path.read_text()
    module = ModuleType(name)
    exec(compile(as_stock(source) if stock else source, path, "exec"), module.__dict__)
    return module


def counted(run: Callable[[], Any]) -> tuple[Any, dict[str, int]]:
    """Return what `run` returns, and how often each operator of fastcnn ran, with codes for a backward or without."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        result = run()
    names = [event.name.removeprefix("fastcnn::") for event in profile.events() if event.name.startswith("fastcnn::")]
    return result, dict(Counter(name.removesuffix("_codes") for name in names))


if __name__ == "__main__":
    folder, name, *argv = sys.argv[1:]
    losses, operators = counted(lambda: load(name).main(argv))
    (Path(folder) / f"{os.environ['RANK']}.json").write_text(json.dumps({"losses": losses, "operators": operators}))
