"""Linear layer, ReLU and dropout: every such stage of the models, as in training."""

import functools
from typing import Any

import torch.nn.functional as F

import fastcnn.functional as FF
from benchmarks import bench_linear_relu
from benchmarks.cells import Cell
from benchmarks.operations import Op, Run, op_work
from benchmarks.shapes import Stage


def stock(stage: Stage) -> Run:
    """Return the layers as a stock model runs them; dropout keeps its mask."""
    activations = bench_linear_relu.stock(stage)
    return lambda input, weight, bias: F.dropout(activations(input, weight, bias))


def fused(_: Stage) -> Run:
    """Return ours, whose output is the mask."""
    return FF.linear_relu_dropout


OP = Op("linear_relu_dropout", stock, fused)


def bench_linear_relu_dropout(cell: Cell, row: Any) -> None:
    row(functools.partial(op_work, OP))
