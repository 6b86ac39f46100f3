"""The training loop behind ``fastcnn train``: data, loop, CUDA graphs, checkpoints and the report of a run."""

import importlib
from typing import TYPE_CHECKING, Any

from fastcnn.train.graphed import GraphedStep
from fastcnn.train.settings import Settings

if TYPE_CHECKING:
    from fastcnn.train.run import Run, train

__all__ = ["GraphedStep", "Run", "Settings", "train"]


def __getattr__(name: str) -> Any:  # what prints needs rich, which GraphedStep's users may lack
    if name in ("Run", "train"):
        return getattr(importlib.import_module("fastcnn.train.run"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
