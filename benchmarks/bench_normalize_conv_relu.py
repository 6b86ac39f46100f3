"""Normalisation, convolution and ReLU: such a first stage of the models, from bytes."""

import functools
from typing import Any

from torch import Tensor, nn

import fastcnn
from benchmarks import bench_conv_relu
from benchmarks.bench_normalize import normalized
from benchmarks.cells import Cell
from benchmarks.operations import Op, Run, op_work
from benchmarks.shapes import Stage


def after_torch(activations: Run) -> Run:
    """Return a stage of stock layers over images that torch normalises."""

    def run(input: Tensor, mean: Tensor, std: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return activations(normalized(input, mean, std, weight.dtype), weight, bias)

    return run


def stock(stage: Stage) -> Run:
    """Return torch's operations, then the layers as a stock model runs them."""
    return after_torch(bench_conv_relu.stock(stage))


def fused(stage: Stage) -> Run:
    """Return ours, one kernel by some algorithms: the layers of a Sequential, which are given the tensors to run on."""
    assert stage.weight
    out_channels, _, *size = stage.weight
    norm = fastcnn.nn.Normalize([0.5] * stage.input[1], [0.25] * stage.input[1])
    settings = stage.convolution
    conv = nn.Conv2d(stage.input[1], out_channels, (size[0], size[1]), **settings, device="meta")
    model = fastcnn.nn.Sequential(norm, conv, nn.ReLU(), *([nn.MaxPool2d(**stage.pool)] if stage.pool else []))

    parameters: dict[str, Any] = conv._parameters

    def run(input: Tensor, mean: Tensor, std: Tensor, weight: Tensor, bias: Tensor) -> Any:
        norm.dtype = weight.dtype
        norm._buffers.update(mean=mean, std=std)
        parameters.update(weight=weight, bias=bias)
        return model(input)

    return run


OP = Op("normalize_conv_relu", stock, fused)


def bench_normalize_conv_relu(cell: Cell, row: Any) -> None:
    row(functools.partial(op_work, OP))
