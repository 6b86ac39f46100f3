"""Convolution and ReLU: every such stage of the models."""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastcnn.functional as FF
from benchmarks.cells import Cell
from benchmarks.operations import Op, Run, op_work
from benchmarks.shapes import Stage


def stock(stage: Stage) -> Run:
    """Return the layers as a stock model runs them: convolution with bias, then the ReLU in place."""
    settings = stage.convolution
    return lambda input, weight, bias: F.relu(F.conv2d(input, weight, bias, **settings), inplace=True)


def fused(stage: Stage) -> Run:
    """Return ours."""
    return functools.partial(FF.conv2d_relu, **stage.convolution)


def cudnn(stage: Stage) -> Run:
    """Return cuDNN's own fusion, which has no backward."""
    settings = tuple(stage.convolution.values())

    def run(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.cudnn_convolution_relu(input, weight, bias, *settings)

    return run


OP = Op("conv_relu", stock, fused, cudnn)


def bench_conv_relu(cell: Cell, row: Any) -> None:
    row(functools.partial(op_work, OP))
