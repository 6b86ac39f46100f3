"""Convolution, ReLU and max-pool: every such stage of the models."""

import functools
from typing import Any

import torch.nn.functional as F

import fastcnn.functional as FF
from benchmarks import bench_conv_relu
from benchmarks.cells import Cell
from benchmarks.operations import Op, Run, op_work
from benchmarks.shapes import Stage


def _pooled(activations: Run, stage: Stage) -> Run:
    settings = stage.pool
    return lambda input, weight, bias: F.max_pool2d(activations(input, weight, bias), **settings)


def stock(stage: Stage) -> Run:
    """Return the layers as a stock model runs them."""
    return _pooled(bench_conv_relu.stock(stage), stage)


def fused(stage: Stage) -> Run:
    """Return ours, which writes the pooled values alone."""
    return functools.partial(FF.conv2d_relu_max_pool2d, **stage.convolution, **stage.pool_of_stage)


def cudnn(stage: Stage) -> Run:
    """Return cuDNN's fusion of convolution and ReLU, then torch's pool."""
    return _pooled(bench_conv_relu.cudnn(stage), stage)


OP = Op("conv_relu_pool", stock, fused, cudnn)


def bench_conv_relu_pool(cell: Cell, row: Any) -> None:
    row(functools.partial(op_work, OP))
