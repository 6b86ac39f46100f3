"""Linear + ReLU + dropout in Triton: torch's matrix product with ReLU, then one in-place pass of dropout."""

import triton
import triton.language as tl
from torch import Tensor

from fastcnn.triton.linear_relu import linear_relu, linear_relu_backward
from fastcnn.triton.tiles import ceil_div, fits_int32, indices

BLOCK = 1024


@triton.jit
def dropout_kernel(y_ptr, seed_ptr, p, scale, ELEMENTS, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """Multiply each element of y by 0 with probability p, else by scale; one program does BLOCK of them.

    The random numbers are Philox's by the seed and the element's index.
    """
    at = indices(tl.program_id(0), BLOCK, WIDE)
    mask = at < ELEMENTS
    kept = tl.where(tl.rand(tl.load(seed_ptr), at) < p, 0.0, scale)
    y = tl.load(y_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, (y * kept).to(y_ptr.dtype.element_ty), mask=mask)  # a product, so that NaN stays


def linear_relu_dropout(input: Tensor, weight: Tensor, bias: Tensor | None, seed: Tensor, p: float) -> Tensor:
    """Operator ``fastcnn::linear_relu_dropout.triton``: (N, features) -> (N, out_features)."""
    y = linear_relu(input, weight, bias)
    if y.numel():
        dropout_kernel[(ceil_div(y.numel(), BLOCK),)](
            y, seed, p, 1 / (1 - p), y.numel(), WIDE=not fits_int32(y), BLOCK=BLOCK
        )
    return y


def linear_relu_dropout_backward(grad: Tensor, output: Tensor, p: float, bias_grad: bool) -> tuple[Tensor, Tensor]:
    """Operator ``fastcnn::linear_relu_dropout_backward.triton``."""
    return linear_relu_backward(grad, output, bias_grad, 1 / (1 - p))
