"""Local response normalization: every such layer of the models by itself."""

import functools
from typing import Any

import torch.nn.functional as F

import fastcnn.functional as FF
from benchmarks.cells import Cell
from benchmarks.operations import Op, Run, op_work
from benchmarks.shapes import Stage


def stock(stage: Stage) -> Run:
    """Return torch's, which squares, pads, averages, takes a power and divides, each over the whole tensor."""
    return functools.partial(F.local_response_norm, **stage.norm)


def fused(stage: Stage) -> Run:
    """Return ours: one pass each way."""
    return functools.partial(FF.local_response_norm, **stage.norm)


OP = Op("lrn", stock, fused)


def bench_lrn(cell: Cell, row: Any) -> None:
    row(functools.partial(op_work, OP))
