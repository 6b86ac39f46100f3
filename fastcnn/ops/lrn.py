"""Local response normalization across channels: the operators ``lrn`` and ``lrn_backward``, and autograd."""

from numbers import Number
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcnn.ops import autograd, checks
from fastcnn.ops.record import INPUT, Op, like
from fastcnn.ops.record import LRN as NORM
from fastcnn.shapes import LARGEST, LRN


def reference(input: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
    """Return what torch returns; under autocast back in the input's dtype (stock turns to float32 there)."""
    output = F.local_response_norm(input, size, alpha, beta, k)
    return output.to(input.dtype) if input.dtype in checks.KERNEL_DTYPES[1:] else output


def stock_backward(grad: Tensor, input: Tensor, norm: LRN) -> Tensor:
    """Return the gradient in stock, differentiable operations."""
    size, alpha, beta, k = norm.operands()
    wide = torch.promote_types(input.dtype, torch.float32)
    x, dy = input.to(wide), grad.to(wide)
    scale = k + alpha / size * _window_sum(x * x, size // 2, (size - 1) // 2)
    ratio = _window_sum(dy * x * scale ** (-beta - 1), (size - 1) // 2, size // 2)
    dx = dy * scale**-beta - 2 * alpha * beta / size * x * ratio
    return dx.to(input.dtype)


def _window_sum(values: Tensor, before: int, after: int) -> Tensor:
    """Sum (N, C, P) over the channels from c - before to c + after."""
    padded = F.pad(values.flatten(2), (0, 0, before, after))
    return padded.unfold(1, before + after + 1, 1).sum(-1).view(values.shape)


def prepare(function: str, input: Tensor, size: int, alpha: float, beta: float, k: float) -> tuple[Tensor, LRN]:
    """Check an LRN's input, (N, C, *), window size and constants; return the input and the settings."""
    checks.check_tensor(function, "input", input)
    if input.dim() < 3:
        raise checks.wrong(
            function, "input", "(N, C, *), three or more axes", f"shape {tuple(input.shape)}", ValueError
        )
    checks.check_integer(function, "size", size)
    if size <= 0:
        raise checks.wrong(function, "size", "a positive number of channels", size)
    if size > LARGEST:
        raise checks.wrong(function, "size", f"at most {LARGEST} channels", size)
    for name, value in (("alpha", alpha), ("beta", beta), ("k", k)):
        if not isinstance(value, (Number, Tensor)):
            raise checks.wrong(function, name, "a number", repr(value), TypeError)
    return input, LRN(size, alpha, beta, k)


def refuse(input: Tensor, norm: LRN, *_: Any) -> str:
    """Say why no kernel normalizes this input so, or return an empty string."""
    if reason := checks.refuse_dtype(input) or checks.refuse_constants(alpha=norm.alpha, beta=norm.beta, k=norm.k):
        return reason
    if norm.alpha < 0 or norm.k < 0:
        return f"takes no negative argument 'alpha' or 'k', got {norm.alpha} and {norm.k}"
    return ""


OP = Op("lrn", "local_response_norm", INPUT, NORM, stock=reference, prepare=prepare, refuse=refuse)
OP.forward(like)
_backward = OP.define("lrn_backward", f"(Tensor grad, {OP.schema}) -> Tensor", lambda grad, input, *_: like(input))


@OP.differentiable("LocalResponseNorm", "norm", saves=lambda ctx, inputs, output: inputs[:1])
def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor]:
    """(N, C, *) -> the same; saves only its input: backward computes the scale anew."""
    (input,) = ctx.saved_tensors
    if autograd.differentiable():
        return (stock_backward(grad, input, ctx.norm),)
    return (_backward[ctx.backend](grad, input, *ctx.norm.operands()),)


OP.runs()
