"""Batch norm + ReLU + max-pool in Triton: the pool's kernel normalizes on its way, and so does bn_relu's backward."""

from torch import Tensor

from fastcnn.shapes import memory_format
from fastcnn.triton.bn_relu import backward
from fastcnn.triton.bn_statistics import Norm
from fastcnn.triton.max_pool import pool


def bn_relu_pool_codes(input: Tensor, *settings, codes: bool = True) -> tuple[Tensor, Tensor | None]:
    """Operator ``fastcnn::bn_relu_pool_codes.triton``."""
    *numbers, window = settings
    return pool(input, Norm.of(*numbers), window, relu=True, codes=codes)


def bn_relu_pool(*arguments) -> Tensor:
    """Operator ``fastcnn::bn_relu_pool.triton``."""
    return bn_relu_pool_codes(*arguments, codes=False)[0]


def bn_relu_pool_backward(grad: Tensor, codes: Tensor, input: Tensor, *settings) -> tuple[Tensor, Tensor, Tensor]:
    """Operator ``fastcnn::bn_relu_pool_backward.triton``: the codes hold the ReLU's mask too."""
    *numbers, training, window = settings
    codes = codes.contiguous(memory_format=memory_format(input))
    return backward(grad, codes, input, Norm.of(*numbers), training, window)
