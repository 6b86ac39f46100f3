"""Local response normalization across channels: the operators ``lrn`` and ``lrn_backward``, and autograd."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcnn.ops import autograd, checks
from fastcnn.ops.record import INPUT, Op, runner
from fastcnn.ops.record import LRN as NORM
from fastcnn.shapes import LRN, memory_format


def reference(input: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
    """Return what torch returns; under autocast back in the input's dtype (stock turns to float32 there)."""
    output = F.local_response_norm(input, size, alpha, beta, k)
    return output.to(input.dtype) if input.dtype in checks.KERNEL_DTYPES[1:] else output


def stock_backward(grad: Tensor, input: Tensor, norm: LRN) -> Tensor:
    """Return the gradient in stock, differentiable operations."""
    wide = torch.promote_types(input.dtype, torch.float32)
    x, dy = input.to(wide), grad.to(wide)
    scale = norm.k + norm.alpha / norm.size * _window_sum(x * x, norm.size // 2, (norm.size - 1) // 2)
    ratio = _window_sum(dy * x * scale ** (-norm.beta - 1), (norm.size - 1) // 2, norm.size // 2)
    dx = dy * scale**-norm.beta - 2 * norm.alpha * norm.beta / norm.size * x * ratio
    return dx.to(input.dtype)


def _window_sum(values: Tensor, before: int, after: int) -> Tensor:
    """Sum (N, C, P) over the channels from c - before to c + after."""
    padded = F.pad(values.flatten(2), (0, 0, before, after))
    return padded.unfold(1, before + after + 1, 1).sum(-1).view(values.shape)


def _fake(input: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(input, memory_format=memory_format(input))


def _fake_backward(grad: Tensor, input: Tensor, *norm: Any) -> Tensor:
    return _fake(input)


def _prepare(*arguments: Any) -> tuple[Tensor, LRN]:
    checks.check_lrn(OP.function, *arguments)
    (input,), norm = OP.split(arguments)
    return input, LRN(*norm)


def refuse(input: Tensor, norm: LRN) -> str:
    """Say why no kernel normalizes this input so, or return an empty string."""
    constants = {"alpha": norm.alpha, "beta": norm.beta, "k": norm.k}
    if reason := checks.refuse_dtype(input) or checks.refuse_constants(**constants):
        return reason
    if norm.alpha < 0 or norm.k < 0:
        return f"takes no negative argument 'alpha' or 'k', got {norm.alpha} and {norm.k}"
    return ""


OP = Op("lrn", "local_response_norm", INPUT, NORM, stock=reference, prepare=_prepare, refuse=refuse)
_forward = OP.forward(_fake)
_backward = OP.define("lrn_backward", f"(Tensor grad, {OP.schema}) -> Tensor", _fake_backward)


class LocalResponseNorm(torch.autograd.Function):
    """(N, C, *) -> the same; saves only its input: backward computes the scale anew."""

    @staticmethod
    def forward(input: Tensor, norm: LRN, backend: str) -> Tensor:
        return _forward[backend](input, *norm.operands())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, ctx.norm, ctx.backend = inputs
        ctx.save_for_backward(input)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (input,) = ctx.saved_tensors
        if autograd.differentiable():
            return stock_backward(grad, input, ctx.norm), None, None
        return _backward[ctx.backend](grad, input, *ctx.norm.operands()), None, None


_run = runner(LocalResponseNorm, _forward)
lrn = OP.by(lambda route, input, norm: _run(input, kernel_norm(norm), route.backend))


def kernel_norm(norm: LRN) -> LRN:
    """Return the settings in Python's own numbers."""
    return LRN(*norm.operands())
