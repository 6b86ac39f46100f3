"""Every distinct stage of the models by itself, operation by operation."""

from typing import Any

from benchmarks.cells import Cell
from benchmarks.operations import WORK


def bench_stages(cell: Cell, row: Any) -> None:
    row(WORK[cell.subject])
