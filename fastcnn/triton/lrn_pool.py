"""LRN + max-pool in Triton: two kernels each way, LRN and pool.

A single kernel would normalize each value again for every window that covers it, or leave lanes idle: more time in
instructions than the second kernel takes. The normalized values are freed after the call; only the codes are kept.
"""

from typing import Any

from torch import Tensor

from fastcnn.triton.lrn import lrn, lrn_backward
from fastcnn.triton.max_pool import max_pool, max_pool_backward, max_pool_codes


def lrn_pool(input: Tensor, *settings: Any) -> Tensor:
    """Operator ``fastcnn::lrn_pool.triton``."""
    *norm, window = settings
    return max_pool(lrn(input, *norm), window)


def lrn_pool_codes(input: Tensor, *settings: Any) -> tuple[Tensor, Tensor | None]:
    """Operator ``fastcnn::lrn_pool_codes.triton``."""
    *norm, window = settings
    return max_pool_codes(lrn(input, *norm), window)


def lrn_pool_backward(grad: Tensor, codes: Tensor, input: Tensor, *settings: Any) -> Tensor:
    """Operator ``fastcnn::lrn_pool_backward.triton``."""
    *norm, window = settings
    height, width = input.shape[2:]
    return lrn_backward(max_pool_backward(grad, codes, height, width, window), input, *norm)
