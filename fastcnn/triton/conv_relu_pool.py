"""Convolution + bias + ReLU + max-pool in Triton: the convolution, then one pass to pooled values and codes."""

from typing import Any

from torch import Tensor

from fastcnn.shapes import Window
from fastcnn.triton.conv_relu import EPILOGUE, asked_hopper, bare_convolution, own_convolution
from fastcnn.triton.convolution.hopper import pools_pairs
from fastcnn.triton.convolution.implicit_gemm import asked, conv_window
from fastcnn.triton.max_pool import pool
from fastcnn.triton.max_pool_backward import pool_backward


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
    if hopper := asked_hopper(algorithm):
        window = conv_window(weight, stride, padding, dilation)
        return hopper.convolution(input, weight, bias, window, groups, algorithm)[0], None
    name, config = asked(algorithm)
    if name not in EPILOGUE:
        window = conv_window(weight, stride, padding, dilation)
        return own_convolution(name, input, weight, bias, window, groups, False, config), None
    return bare_convolution(input, weight, stride, padding, dilation, groups), bias


def _run(
    input: Tensor, weight: Tensor, bias: Tensor | None, settings: Any, codes: bool
) -> tuple[Tensor, Tensor | None]:
    """Return pooled values, and codes if asked: in the convolution's own kernel, or by a pass over its output."""
    *convolution, window = settings
    *kernel_window, groups, algorithm = convolution
    if hopper := asked_hopper(algorithm):
        kernel = conv_window(weight, *kernel_window)
        if pools_pairs(window, *kernel.output_size(*input.shape[2:])):
            return hopper.convolution(input, weight, bias, kernel, groups, algorithm, pool=True, codes=codes)
    conv, bias = _convolution(input, weight, bias, *convolution)
    return pool(conv, bias, window, relu=True, codes=codes)


def conv_relu_pool(input: Tensor, weight: Tensor, bias: Tensor | None, *settings) -> Tensor:
    """Operator ``fastcnn::conv_relu_pool.triton``."""
    return _run(input, weight, bias, settings, codes=False)[0]


def conv_relu_pool_codes(input: Tensor, weight: Tensor, bias: Tensor | None, *settings) -> tuple[Tensor, Tensor | None]:
    """Operator ``fastcnn::conv_relu_pool_codes.triton``."""
    return _run(input, weight, bias, settings, codes=True)


def conv_relu_pool_backward(
    grad: Tensor, codes: Tensor, height: int, width: int, bias_grad: bool, window: Window
) -> tuple[Tensor, Tensor]:
    """Operator ``fastcnn::conv_relu_pool_backward.triton``: unpool, ReLU mask and bias gradient in one pass."""
    return pool_backward(grad, codes, height, width, window, bias_grad)
