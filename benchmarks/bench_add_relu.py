"""Addition and ReLU: the end of every residual block of the models."""

import functools
from typing import Any

import torch.nn.functional as F

import fastcnn.functional as FF
from benchmarks.cells import Cell
from benchmarks.operations import Op, Run, op_work
from benchmarks.shapes import Stage


def stock(_: Stage) -> Run:
    """Return the sum, then the ReLU in place."""
    return lambda input, other: F.relu(input + other, inplace=True)


def fused(_: Stage) -> Run:
    """Return ours: one pass each way."""
    return FF.add_relu


OP = Op("add_relu", stock, fused)


def bench_add_relu(cell: Cell, row: Any) -> None:
    row(functools.partial(op_work, OP))
