"""Addition + ReLU in Triton: one pass over memory, whatever its layout; backward masks by the output's sign."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcnn.triton.tiles import ceil_div

BLOCK = 1024


@triton.jit
def add_relu_kernel(x_ptr, other_ptr, y_ptr, elements, BLOCK: tl.constexpr):
    """Add and apply ReLU; one program computes BLOCK elements."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < elements
    x = tl.load(x_ptr + at, mask=mask, other=0.0)
    y = x.to(tl.float32) + tl.load(other_ptr + at, mask=mask, other=0.0).to(tl.float32)
    y = y.to(x.dtype)
    tl.store(y_ptr + at, tl.where(y <= 0.0, 0.0, y), mask=mask)


@triton.jit
def add_relu_backward_kernel(grad_ptr, y_ptr, dx_ptr, elements, BLOCK: tl.constexpr):
    """Mask grad by the sign of y into dx; one program computes BLOCK elements."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < elements
    y = tl.load(y_ptr + at, mask=mask, other=0.0)
    grad = tl.load(grad_ptr + at, mask=mask, other=0.0)
    tl.store(dx_ptr + at, tl.where(y <= 0.0, 0.0, grad), mask=mask)


def _launch(kernel: Any, first: Tensor, second: Tensor, like: Tensor) -> Tensor:
    out = torch.empty_like(like)
    if out.numel():
        kernel[(ceil_div(out.numel(), BLOCK),)](
            _as_dense(first, out), _as_dense(second, out), out, out.numel(), BLOCK=BLOCK
        )
    return out


def _as_dense(tensor: Tensor, like: Tensor) -> Tensor:
    return tensor if tensor.stride() == like.stride() else torch.empty_like(like).copy_(tensor)


def add_relu(input: Tensor, other: Tensor) -> Tensor:
    """Operator ``fastcnn::add_relu.triton``."""
    return _launch(add_relu_kernel, input, other, input)


def add_relu_backward(grad: Tensor, output: Tensor) -> Tensor:
    """Operator ``fastcnn::add_relu_backward.triton``."""
    return _launch(add_relu_backward_kernel, grad, output, output)
