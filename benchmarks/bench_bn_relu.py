"""Batch norm and ReLU: every such stage of the models, by the statistics of the batch and by the running ones."""

import functools
from typing import Any

import torch.nn.functional as F

import fastcnn.functional as FF
from benchmarks.cells import Cell
from benchmarks.operations import Op, Run, op_work
from benchmarks.shapes import Stage


def stock(stage: Stage) -> Run:
    """Return the layers as a stock model runs them: batch norm, then the ReLU in place."""
    settings = stage.batch_norm
    return lambda *tensors: F.relu(F.batch_norm(*tensors, **settings), inplace=True)


def fused(stage: Stage) -> Run:
    """Return ours."""
    return functools.partial(FF.batch_norm_relu, **stage.batch_norm)


OP = Op("bn_relu", stock, fused)


def bench_bn_relu(cell: Cell, row: Any) -> None:
    row(functools.partial(op_work, OP))
