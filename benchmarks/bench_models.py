"""Whole models: inference and a training step with SGD, by every baseline and by fastcnn."""

from typing import Any

from benchmarks.cells import Cell
from benchmarks.networks import model_work


def bench_models(cell: Cell, row: Any) -> None:
    row(model_work)
