"""Linear layer and ReLU: the operators ``linear_relu`` and ``linear_relu_backward``, and autograd.

The matrix products are torch's; ours is the pass that masks the gradient and sums the bias gradient.
"""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from fastcnn.ops import autograd, checks, stock
from fastcnn.ops.conv_relu import fake_backward
from fastcnn.ops.record import INPUT, LINEAR, Op


def reference(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return linear and ReLU as torch runs them."""
    return stock.relu(F.linear(input, weight, bias))


def fake(input: Tensor, weight: Tensor, *_: Any) -> Tensor:
    """Return an empty tensor with the shape of the output."""
    return input.new_empty(input.shape[0], weight.shape[0])


def flops(input: Tensor, weight: Tensor, *_: Any) -> int:
    """Return the number of FLOPs of a linear layer."""
    return 2 * input.shape[0] * weight.numel()


def refuse(input: Tensor, weight: Tensor, bias: Tensor | None) -> str:
    """Say why no kernel takes these, or return an empty string."""
    if weight.dim() == 1:
        return "takes argument 'weight' as (out_features, in_features), got one axis"
    if bias is not None and bias.shape not in ((), (1,), weight.shape[:1]):
        return f"takes argument 'bias' as ({weight.shape[0]},), got shape {tuple(bias.shape)}"
    return checks.refuse_dtype(input)


def prepare(function: str, input: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Check a linear layer's arguments, and apply autocast."""
    input, weight, bias = autograd.autocast(function, input, weight, bias)
    sizes, matrix, dtype, device = input.shape, weight.shape, input.dtype, input.device
    if (
        (len(sizes) > 0 and len(matrix) == 2 and sizes[-1] == matrix[1])
        and (dtype == weight.dtype and device == weight.device)
        and (bias is None or (bias.shape == matrix[:1] and bias.dtype == dtype and bias.device == device))
    ):
        return input, weight, bias  # the usual case costs little
    checks.check_match(function, input, weight=weight, bias=bias)
    if weight.dim() not in (1, 2):
        raise checks.wrong(function, "weight", "(out_features, in_features)", f"shape {tuple(weight.shape)}")
    if weight.dim() == 1 and bias is not None:
        raise checks.wrong(function, "bias", "None with a weight of one axis", f"shape {tuple(bias.shape)}")
    if input.dim() == 0 or input.shape[-1] != weight.shape[-1]:
        got = f"shape {tuple(input.shape)}"
        raise checks.wrong(function, "input", f"{weight.shape[-1]} features in the last axis", got)
    if bias is None:
        return input, weight, bias
    output = (*input.shape[:-1], weight.shape[0])
    fits = bias.dim() <= max(2, len(output)) and all(b in (1, o) for b, o in zip(bias.shape[::-1], output[::-1]))
    if not fits:
        raise checks.wrong(function, "bias", f"shape ({weight.shape[0]},)", tuple(bias.shape))
    return input, weight, bias


OP = Op("linear_relu", "linear_relu", INPUT, LINEAR, stock=reference, prepare=prepare, refuse=refuse, product="matmul")
OP.forward(fake, flops)
_backward = OP.define(
    "linear_relu_backward",
    "(Tensor grad, Tensor output, bool bias_grad) -> (Tensor grad_linear, Tensor grad_bias)",
    fake_backward,
)


def operands_to_save(ctx: Any, inputs: tuple[Any, ...]) -> tuple[Tensor | None, Tensor | None]:
    """Return input and weight, each only if the other's gradient will be asked for."""
    needs = ctx.needs_input_grad
    return inputs[0] if needs[1] else None, inputs[1] if needs[0] else None


@OP.differentiable("LinearReLU", saves=lambda ctx, inputs, output: (*operands_to_save(ctx, inputs), output))
def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """(N, features) -> (N, out_features); saves input, weight and the output, whose sign is the ReLU mask."""
    input, weight, output = ctx.saved_tensors
    needs = ctx.needs_input_grad
    if autograd.differentiable():
        grad_linear, grad_bias = autograd.relu_gradient(grad, output), None
    else:
        grad_linear, grad_bias = _backward[ctx.backend](grad, output, needs[2])
    return gradients(grad_linear, grad_bias, input, weight, needs)


def gradients(
    grad: Tensor, grad_bias: Tensor | None, input: Tensor, weight: Tensor, needs: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of input, weight and bias from that of the linear layer's output, each only if needed."""
    if needs[2] and grad_bias is None:
        grad_bias = grad.sum(0)
    return grad @ weight if needs[0] else None, grad.t() @ input if needs[1] else None, grad_bias if needs[2] else None


def by_rows(run: Callable[..., Any], input: Tensor, weight: Tensor, bias: Tensor | None, *others: Any) -> Any:
    """Run a kernel, which takes rows (N, in_features) and a bias of every feature, on an input of any rank."""
    if bias is not None and bias.shape != weight.shape[:1]:
        bias = bias.expand(weight.shape[0])
    if input.dim() == 2:
        return run(input, weight, bias, *others)
    rows = input.flatten(0, -2) if input.dim() > 1 else input[None]
    return run(rows, weight, bias, *others).view(*input.shape[:-1], weight.shape[0])


OP.runs(lambda route, *prepared: by_rows(OP.run, *prepared, route.backend))
