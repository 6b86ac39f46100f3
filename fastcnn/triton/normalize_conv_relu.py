"""Normalization, convolution, bias and ReLU in Triton: the first layers' algorithms, which read raw images."""

from typing import Any

from torch import Tensor

from fastcnn.triton.convolution.first_layers import ALGORITHMS, Norm
from fastcnn.triton.convolution.implicit_gemm import asked, conv_window


def normalized_convolution(
    input: Tensor,
    mean: Tensor,
    std: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    algorithm: str,
    *,
    relu: bool,
) -> Tensor:
    """Normalize images and convolve them in one kernel, which then adds the bias and, if asked, takes the ReLU."""
    name, config = asked(algorithm)
    window = conv_window(weight, stride, padding, dilation)
    return ALGORITHMS[name](input, weight, bias, window, groups, relu, config, Norm(mean, std))


def normalize_conv_relu(*arguments: Any) -> Tensor:
    """Operator ``fastcnn::normalize_conv_relu.triton``."""
    return normalized_convolution(*arguments, relu=True)
