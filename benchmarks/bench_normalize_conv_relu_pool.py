"""Normalisation, convolution, ReLU and max-pool: such a first stage of the models, from bytes."""

import functools
from typing import Any

from benchmarks import bench_conv_relu_pool
from benchmarks.bench_normalize_conv_relu import after_torch, fused
from benchmarks.cells import Cell
from benchmarks.operations import Op, Run, op_work
from benchmarks.shapes import Stage


def stock(stage: Stage) -> Run:
    """Return torch's operations, then the layers as a stock model runs them."""
    return after_torch(bench_conv_relu_pool.stock(stage))


OP = Op("normalize_conv_relu_pool", stock, fused)


def bench_normalize_conv_relu_pool(cell: Cell, row: Any) -> None:
    row(functools.partial(op_work, OP))
