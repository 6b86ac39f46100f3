"""Addition and ReLU, the end of a residual block: ``add_relu``, ``add_relu_backward``, and autograd."""

from typing import Any

import torch
from torch import Tensor

from fastcnn.ops import autograd, checks, stock
from fastcnn.ops.record import INPUT, OTHER, Op


def reference(input: Tensor, other: Tensor) -> Tensor:
    """Return the sum and its ReLU as torch runs them."""
    return stock.relu(torch.add(input, other))


def _fake(input: Tensor, _: Tensor) -> Tensor:
    return torch.empty_like(input)


def _prepare(function: str, input: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    checks.check_tensor(function, "input", input)
    checks.check_tensor(function, "other", other)
    shapes = zip(input.shape[::-1], other.shape[::-1])  # broadcasting looks at the axes that both have
    if any(a != b and 1 not in (a, b) for a, b in shapes):
        expected = f"a shape that broadcasts with {tuple(input.shape)}, that of 'input'"
        raise checks.wrong(function, "other", expected, tuple(other.shape))
    if input.device != other.device and 0 not in (input.dim(), other.dim()):
        raise checks.wrong(function, "other", f"a tensor on {input.device}, where 'input' is", other.device)
    return input, other


def _refuse(input: Tensor, other: Tensor) -> str:
    if reason := checks.refuse_dtype(input):
        return reason
    if other.dtype != input.dtype:
        return f"takes argument 'other' in the dtype of 'input', {input.dtype}, got {other.dtype}"
    if other.shape != input.shape:
        return f"takes argument 'other' in the shape of 'input', {tuple(input.shape)}, got {tuple(other.shape)}"
    return ""


OP = Op("add_relu", "add_relu", INPUT, OTHER, stock=reference, prepare=_prepare, refuse=_refuse)
OP.forward(_fake)
_backward = OP.define(
    "add_relu_backward", "(Tensor grad, Tensor output) -> Tensor", lambda grad, output: _fake(output, grad)
)


def _vmap(info: Any, in_dims: Any, *args: Any) -> Any:
    *tensors, backend = args
    input, other = (
        arg.movedim(dim, 0) if dim is not None else arg.expand(info.batch_size, *arg.shape)
        for arg, dim in zip(tensors, in_dims)
    )
    return OP.apply(input, other, backend), 0


@OP.differentiable("AddReLU", saves=lambda ctx, inputs, output: (output,), vmap=_vmap)
def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Two tensors of one shape -> the same; saves the output alone, whose sign is the ReLU mask."""
    (output,) = ctx.saved_tensors
    if autograd.differentiable():
        masked = autograd.relu_gradient(grad, output)
    else:
        masked = _backward[ctx.backend](grad, output)
    needs = ctx.needs_input_grad
    return masked if needs[0] else None, masked if needs[1] else None


OP.runs()
