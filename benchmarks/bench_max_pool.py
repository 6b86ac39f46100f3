"""Max-pooling: every pool of the models by itself."""

import functools
from typing import Any

import torch.nn.functional as F

import fastcnn.functional as FF
from benchmarks.cells import Cell
from benchmarks.operations import Op, Run, op_work
from benchmarks.shapes import Stage


def stock(stage: Stage) -> Run:
    """Return torch's pool, which writes int64 indices beside the values."""
    return functools.partial(F.max_pool2d, **stage.pool)


def fused(stage: Stage) -> Run:
    """Return ours, which writes one byte a window, and only for a backward."""
    return functools.partial(FF.max_pool2d, **stage.pool)


OP = Op("max_pool", stock, fused)


def bench_max_pool(cell: Cell, row: Any) -> None:
    row(functools.partial(op_work, OP))
