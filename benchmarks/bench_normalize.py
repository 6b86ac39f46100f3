"""Normalisation of images: the batches of the models, from bytes into the dtype that a model takes."""

import functools
from typing import Any

import torch
from torch import Tensor

import fastcnn.functional as FF
from benchmarks.cells import Cell
from benchmarks.operations import Op, Run, op_work
from benchmarks.shapes import Stage


def normalized(input: Tensor, mean: Tensor, std: Tensor, dtype: torch.dtype) -> Tensor:
    """Return images as the usual transforms make them: 0 to 1, minus the mean, over the deviation, then cast."""
    unit = input.to(torch.float32).div_(255)
    return unit.sub_(mean[:, None, None]).div_(std[:, None, None]).to(dtype)


def stock(_: Stage) -> Run:
    """Return torch's operations, each over the whole tensor."""
    return lambda input, mean, std, like: normalized(input, mean, std, like.dtype)


def fused(_: Stage) -> Run:
    """Return ours: one pass."""
    return lambda input, mean, std, like: FF.normalize(input, mean, std, like.dtype)


OP = Op("normalize", stock, fused)


def bench_normalize(cell: Cell, row: Any) -> None:
    row(functools.partial(op_work, OP))
