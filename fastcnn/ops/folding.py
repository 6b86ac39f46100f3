"""Folding a batch norm in evaluation into the convolution before it: whether to, and the folded weight and bias."""

from typing import Any

import torch
from torch import Tensor

from fastcnn.backend import chosen
from fastcnn.ops import autograd, checks
from fastcnn.ops.record import Op
from fastcnn.route import is_open

_OP = Op("conv_bn", "convolution and batch norm")  # no operator of its own; `FASTEST` has it by this name


def folds(input: Tensor, stride: tuple[int, ...], weight: Tensor, *parameters: Tensor | None) -> bool:
    """Whether to fold the batch norm that follows into a convolution of `input`.

    Only without gradients, and if the output has at least as many elements as the weight, which folding reads and
    writes. Under ``auto`` only where folding was measured to be faster, under ``torch`` never.
    """
    forced = chosen() not in ("auto", "torch")
    if not forced and not is_open(_OP.stem, input):
        return False
    if autograd.needs_grad(input, weight, *parameters) or input.dtype not in checks.KERNEL_DTYPES or min(stride) < 1:
        return False
    if not forced and _OP.route((input, weight, *parameters))[0].backend == "torch":
        return False
    if torch.compiler.is_compiling():  # the graph must not depend on a size that may vary
        return True
    pixels = input.shape[0] * (input.shape[2] // stride[0]) * (input.shape[3] // stride[1])
    return pixels * weight.shape[0] >= weight.numel()


def folded(
    weight: Tensor, bias: Tensor | None, mean: Any, variance: Any, gamma: Tensor | None, beta: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return weight and bias of the one convolution, in the convolution's dtype."""
    scale = (variance.float() + eps).rsqrt()
    if gamma is not None:
        scale = scale * gamma
    shift = -mean * scale if bias is None else (bias - mean) * scale
    if beta is not None:
        shift = shift + beta
    return (weight * scale.view(-1, 1, 1, 1)).to(weight.dtype), shift.to(weight.dtype)
