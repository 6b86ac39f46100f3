"""The registry of the operations that are timed: how a stage of each runs on stock layers, by fastcnn, and by cuDNN.

An entry makes of a stage a function of its tensors (see `work.tensors`). Stock layers run as a stock model runs them:
with bias, and the ReLU in place.
"""

import contextlib
import functools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastcnn
import fastcnn.functional as FF
from benchmarks.cells import Cell
from benchmarks.measure import Work
from benchmarks.sgd import sgd_work
from benchmarks.shapes import Stage
from benchmarks.work import Operation, Run, stage_work


def relu(run: Run) -> Run:
    """Return the function with a ReLU after it."""
    return lambda *tensors: F.relu(run(*tensors), inplace=True)


def pooled(run: Run, stage: Stage) -> Run:
    """Return the function with the stage's max-pool after it."""
    pool = partial(F.max_pool2d, **stage.pool)
    return lambda *tensors: pool(run(*tensors))


def linear_relu(_: Stage) -> Run:
    """Return the product with bias, then the ReLU."""
    return relu(F.linear)


def conv_relu(stage: Stage) -> Run:
    """Return the convolution with bias, then the ReLU."""
    return relu(partial(F.conv2d, **stage.convolution))


def cudnn_conv_relu(stage: Stage) -> Run:
    """Return cuDNN's own fusion, which has no backward."""
    settings = tuple(stage.convolution.values())
    return lambda input, weight, bias: torch.cudnn_convolution_relu(input, weight, bias, *settings)


def bn_relu(stage: Stage) -> Run:
    """Return the batch norm, then the ReLU."""
    return relu(partial(F.batch_norm, **stage.batch_norm))


def dropped(run: Run) -> Run:
    """Return the function with dropout after it, which keeps its mask."""
    return lambda *tensors: F.dropout(run(*tensors))


def normalized(input: Tensor, mean: Tensor, std: Tensor, dtype: torch.dtype) -> Tensor:
    """Return images as the usual transforms make them: 0 to 1, minus the mean, over the deviation, then cast."""
    unit = input.to(torch.float32).div_(255)
    return unit.sub_(mean[:, None, None]).div_(std[:, None, None]).to(dtype)


def after_torch(activations: Run) -> Run:
    """Return a stage of stock layers over images that torch normalizes."""
    return lambda input, mean, std, weight, bias: activations(normalized(input, mean, std, weight.dtype), weight, bias)


def normalize_and_conv(stage: Stage) -> Run:
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


OPERATIONS = {
    "conv_relu": Operation(
        stock=conv_relu,
        fused=lambda stage: partial(FF.conv2d_relu, **stage.convolution),
        cudnn=cudnn_conv_relu,
    ),
    "conv_relu_pool": Operation(
        stock=lambda stage: pooled(conv_relu(stage), stage),
        fused=lambda stage: partial(FF.conv2d_relu_max_pool2d, **stage.convolution, **stage.pool_of_stage),
        cudnn=lambda stage: pooled(cudnn_conv_relu(stage), stage),
    ),
    "max_pool": Operation(
        stock=lambda stage: partial(F.max_pool2d, **stage.pool),
        fused=lambda stage: partial(FF.max_pool2d, **stage.pool),
    ),
    "lrn": Operation(
        stock=lambda stage: partial(F.local_response_norm, **stage.norm),
        fused=lambda stage: partial(FF.local_response_norm, **stage.norm),
    ),
    "lrn_pool": Operation(
        stock=lambda stage: pooled(partial(F.local_response_norm, **stage.norm), stage),
        fused=lambda stage: partial(FF.local_response_norm_max_pool2d, **stage.norm, **stage.pool_of_stage),
    ),
    "linear_relu": Operation(stock=linear_relu, fused=lambda _: FF.linear_relu),
    "linear_relu_dropout": Operation(
        stock=lambda stage: dropped(linear_relu(stage)),
        fused=lambda _: FF.linear_relu_dropout,
    ),
    "bn_relu": Operation(
        stock=bn_relu,
        fused=lambda stage: partial(FF.batch_norm_relu, **stage.batch_norm),
    ),
    "bn_relu_pool": Operation(
        stock=lambda stage: pooled(bn_relu(stage), stage),
        fused=lambda stage: partial(FF.batch_norm_relu_max_pool2d, **stage.batch_norm, **stage.pool_of_stage),
    ),
    "add_relu": Operation(
        stock=lambda _: relu(torch.add),
        fused=lambda _: FF.add_relu,
    ),
    "normalize": Operation(
        stock=lambda _: lambda input, mean, std, like: normalized(input, mean, std, like.dtype),
        fused=lambda _: lambda input, mean, std, like: FF.normalize(input, mean, std, like.dtype),
    ),
    "normalize_conv_relu": Operation(
        stock=lambda stage: after_torch(conv_relu(stage)),
        fused=normalize_and_conv,
    ),
    "normalize_conv_relu_pool": Operation(
        stock=lambda stage: after_torch(pooled(conv_relu(stage), stage)),
        fused=normalize_and_conv,
    ),
}
# What makes of a cell and a device the work that is timed, by the cell's subject.
WORK: dict[str, Callable[[Cell, torch.device], contextlib.AbstractContextManager[Work]]] = {
    **{stem: functools.partial(stage_work, operation) for stem, operation in OPERATIONS.items()},
    "sgd": sgd_work,
}
