"""LRN + max-pool in Triton: two kernels each way, LRN and pool.

A single kernel would normalize each value again for every window that covers it, or leave lanes idle: more time in
instructions than the second kernel takes. The normalized values are freed after the call; only the codes are kept.
"""

from torch import Tensor

from fastcnn.shapes import Window
from fastcnn.triton.bn_statistics import Norm
from fastcnn.triton.lrn import lrn, lrn_backward
from fastcnn.triton.max_pool import pool
from fastcnn.triton.max_pool_backward import pool_backward


def lrn_pool(input: Tensor, size: int, alpha: float, beta: float, k: float, window: Window) -> Tensor:
    """Operator ``fastcnn::lrn_pool.triton``."""
    return pool(lrn(input, size, alpha, beta, k), Norm.of_bias(None), window, relu=False, codes=False)[0]


def lrn_pool_codes(
    input: Tensor, size: int, alpha: float, beta: float, k: float, window: Window
) -> tuple[Tensor, Tensor | None]:
    """Operator ``fastcnn::lrn_pool_codes.triton``."""
    return pool(lrn(input, size, alpha, beta, k), Norm.of_bias(None), window, relu=False, codes=True)


def lrn_pool_backward(
    grad: Tensor, codes: Tensor, input: Tensor, size: int, alpha: float, beta: float, k: float, window: Window
) -> Tensor:
    """Operator ``fastcnn::lrn_pool_backward.triton``."""
    height, width = input.shape[2:]
    unpooled = pool_backward(grad, codes, height, width, window, bias_grad=False)[0]
    return lrn_backward(unpooled, input, size, alpha, beta, k)
