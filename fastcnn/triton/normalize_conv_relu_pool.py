"""Normalization, convolution, bias, ReLU and max-pool in Triton: the joined convolution, then one pass."""

from typing import Any

from torch import Tensor

from fastcnn.triton.bn_statistics import Norm
from fastcnn.triton.max_pool import pool
from fastcnn.triton.normalize_conv_relu import normalize_conv_relu


def normalize_conv_relu_pool_codes(*arguments: Any, codes: bool = True) -> tuple[Tensor, Tensor | None]:
    """Operator ``fastcnn::normalize_conv_relu_pool_codes.triton``."""
    *convolution, window = arguments
    return pool(normalize_conv_relu(*convolution, relu=False), Norm(), window, relu=True, codes=codes)


def normalize_conv_relu_pool(*arguments: Any) -> Tensor:
    """Operator ``fastcnn::normalize_conv_relu_pool.triton``."""
    return normalize_conv_relu_pool_codes(*arguments, codes=False)[0]
