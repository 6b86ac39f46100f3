"""Linear layer and ReLU: every such stage of the models."""

import functools
from typing import Any

import torch.nn.functional as F

import fastcnn.functional as FF
from benchmarks.cells import Cell
from benchmarks.operations import Op, Run, op_work
from benchmarks.shapes import Stage


def stock(_: Stage) -> Run:
    """Return the layers as a stock model runs them: the product with bias, then the ReLU in place."""
    return lambda input, weight, bias: F.relu(F.linear(input, weight, bias), inplace=True)


def fused(_: Stage) -> Run:
    """Return ours."""
    return FF.linear_relu


OP = Op("linear_relu", stock, fused)


def bench_linear_relu(cell: Cell, row: Any) -> None:
    row(functools.partial(op_work, OP))
