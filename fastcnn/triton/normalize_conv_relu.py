"""Normalization, convolution, bias and ReLU in Triton: the first layers' algorithms, which read raw images."""

from typing import Any

from torch import Tensor

from fastcnn.triton.conv_relu import convolution
from fastcnn.triton.normalize import per_channel


def normalize_conv_relu(input: Tensor, mean: Tensor, std: Tensor, *others: Any, relu: bool = True) -> Tensor:
    """Operator ``fastcnn::normalize_conv_relu.triton``: one kernel; without the ReLU if asked."""
    norm = per_channel(mean, input.shape[1]), per_channel(std, input.shape[1])
    return convolution(input, *others, relu=relu, norm=norm)[0]
