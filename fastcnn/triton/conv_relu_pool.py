"""Convolution + bias + ReLU + max-pool in Triton: the convolution, then one pass to pooled values and codes."""

from torch import Tensor

from fastcnn.shapes import Window
from fastcnn.triton.conv_relu import EPILOGUE, asked, bare_convolution, conv_window, own_convolution
from fastcnn.triton.max_pool import pool, pool_backward


def _convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    algorithm: str | None,
) -> tuple[Tensor, Tensor | None]:
    """Return the convolution, and the bias if the pooling pass must still add it."""
    name, config = asked(algorithm)
    if name not in EPILOGUE:
        window = conv_window(weight, stride, padding, dilation)
        return own_convolution(name, input, weight, bias, window, groups, False, config), None
    return bare_convolution(input, weight, stride, padding, dilation, groups), bias


def conv_relu_pool(input: Tensor, weight: Tensor, bias: Tensor | None, *settings) -> Tensor:
    """Operator ``fastcnn::conv_relu_pool.triton``."""
    conv, bias = _convolution(input, weight, bias, *settings[:5])
    return pool(conv, bias, Window.of(*settings[5:]), relu=True, codes=False)[0]


def conv_relu_pool_codes(input: Tensor, weight: Tensor, bias: Tensor | None, *settings) -> tuple[Tensor, Tensor | None]:
    """Operator ``fastcnn::conv_relu_pool_codes.triton``."""
    conv, bias = _convolution(input, weight, bias, *settings[:5])
    return pool(conv, bias, Window.of(*settings[5:]), relu=True, codes=True)


def conv_relu_pool_backward(
    grad: Tensor, codes: Tensor, height: int, width: int, bias_grad: bool, *window
) -> tuple[Tensor, Tensor]:
    """Operator ``fastcnn::conv_relu_pool_backward.triton``: unpool, ReLU mask and bias gradient in one pass."""
    return pool_backward(grad, codes, height, width, Window.of(*window), bias_grad)
