"""Local response normalization and max-pool: every such stage of the models."""

import functools
from typing import Any

import torch.nn.functional as F

import fastcnn.functional as FF
from benchmarks.cells import Cell
from benchmarks.operations import Op, Run, op_work
from benchmarks.shapes import Stage


def stock(stage: Stage) -> Run:
    """Return the layers as a stock model runs them."""
    norm, pool = stage.norm, stage.pool
    return lambda input: F.max_pool2d(F.local_response_norm(input, **norm), **pool)


def fused(stage: Stage) -> Run:
    """Return ours, which writes the pooled values alone."""
    return functools.partial(FF.local_response_norm_max_pool2d, **stage.norm, **stage.pool_of_stage)


OP = Op("lrn_pool", stock, fused)


def bench_lrn_pool(cell: Cell, row: Any) -> None:
    row(functools.partial(op_work, OP))
