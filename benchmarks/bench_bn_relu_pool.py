"""Batch norm, ReLU and max-pool: every such stage of the models, by both kinds of statistics."""

import functools
from typing import Any

import torch.nn.functional as F

import fastcnn.functional as FF
from benchmarks import bench_bn_relu
from benchmarks.cells import Cell
from benchmarks.operations import Op, Run, op_work
from benchmarks.shapes import Stage


def stock(stage: Stage) -> Run:
    """Return the layers as a stock model runs them."""
    activations, pool = bench_bn_relu.stock(stage), stage.pool
    return lambda *tensors: F.max_pool2d(activations(*tensors), **pool)


def fused(stage: Stage) -> Run:
    """Return ours, which writes the pooled values alone."""
    return functools.partial(FF.batch_norm_relu_max_pool2d, **stage.batch_norm, **stage.pool_of_stage)


OP = Op("bn_relu_pool", stock, fused)


def bench_bn_relu_pool(cell: Cell, row: Any) -> None:
    row(functools.partial(op_work, OP))
