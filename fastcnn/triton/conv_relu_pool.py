"""Convolution + bias + ReLU + max-pool in Triton: the convolution, then one pass to pooled values and codes."""

from typing import Any

from torch import Tensor

from fastcnn.shapes import Window
from fastcnn.triton.bn_statistics import Norm
from fastcnn.triton.conv_relu import asked_hopper, convolution
from fastcnn.triton.convolution.hopper import pools_pairs
from fastcnn.triton.max_pool import pool
from fastcnn.triton.max_pool_backward import pool_backward
from fastcnn.triton.tiles import vector


def conv_relu_pool_codes(
    input: Tensor, weight: Tensor, bias: Tensor | None, *settings: Any, codes: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Operator ``fastcnn::conv_relu_pool_codes.triton``: one kernel, or the convolution and a pass over its output."""
    *before, window = settings
    taps, _, algorithm = before
    if (hopper := asked_hopper(algorithm)) and pools_pairs(window, *taps.output_size(*input.shape[2:])):
        return hopper(input, weight, bias, *before, pool=True, codes=codes)
    y, left = convolution(input, weight, bias, *before, relu=False)
    return pool(y, Norm(bias=vector(bias) if left else None), window, relu=True, codes=codes)


def conv_relu_pool(*arguments: Any) -> Tensor:
    """Operator ``fastcnn::conv_relu_pool.triton``."""
    return conv_relu_pool_codes(*arguments, codes=False)[0]


def conv_relu_pool_backward(
    grad: Tensor, codes: Tensor, height: int, width: int, bias_grad: bool, window: Window
) -> tuple[Tensor, Tensor]:
    """Operator ``fastcnn::conv_relu_pool_backward.triton``: unpool, ReLU mask and bias gradient in one pass."""
    return pool_backward(grad, codes, height, width, window, bias_grad)
