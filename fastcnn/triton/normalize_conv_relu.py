"""Normalization, convolution, bias and ReLU in Triton: the first layers' algorithms, which read raw images."""

from typing import Any

from torch import Tensor

from fastcnn.triton.conv_relu import convolution
from fastcnn.triton.convolution.implicit_gemm import Normalization


def normalized_convolution(input: Tensor, mean: Tensor, std: Tensor, *others: Any, relu: bool) -> Tensor:
    """Normalize images and convolve them in one kernel, which then adds the bias and, if asked, takes the ReLU."""
    return convolution(input, *others, relu=relu, norm=Normalization(mean, std))[0]


def normalize_conv_relu(*arguments: Any) -> Tensor:
    """Operator ``fastcnn::normalize_conv_relu.triton``."""
    return normalized_convolution(*arguments, relu=True)
