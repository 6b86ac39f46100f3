"""Linear layer, ReLU and dropout: ``linear_relu_dropout`` and ``linear_relu_dropout_backward``, and autograd.

The output tells the mask: it is zero where ReLU is off or the unit is dropped. Elsewhere it is the activation over
1 - p, so backward needs neither the activation nor the random numbers. Where the output is NaN the unit counts as kept.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcnn.front import fronted
from fastcnn.ops import autograd, checks, plans
from fastcnn.ops.conv_relu import fake_backward
from fastcnn.ops.linear_relu import OP as LINEAR_RELU
from fastcnn.ops.linear_relu import by_rows, fake, flops, gradients, operands_to_save, prepare, refuse
from fastcnn.ops.record import INPUT, LINEAR, Op

OP = Op(
    "linear_relu_dropout",
    "linear_relu_dropout",
    INPUT,
    LINEAR,
    prepare=prepare,
    refuse=refuse,
    backends=("triton",),
    product="matmul",
    tuned=False,
)
OP.forward(fake, flops, more=", Tensor seed, float p")
_backward = OP.define(
    "linear_relu_dropout_backward",
    "(Tensor grad, Tensor output, float p, bool bias_grad) -> (Tensor grad_linear, Tensor grad_bias)",
    lambda grad, output, p, bias_grad: fake_backward(grad, output, bias_grad),
)


def _forward(
    input: Tensor, weight: Tensor, bias: Tensor | None, seed: Tensor, p: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    output = OP.values[backend](input, weight, bias, seed, p)
    return output, output != 0, autograd.anchor(output)


@OP.differentiable(
    "LinearReLUDropout",
    "p",
    saves=lambda ctx, inputs, output: (*operands_to_save(ctx, inputs), *output[1:]),
    anchored=True,
    forward=_forward,
)
def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """(N, features) -> (N, out_features), a mask of what is not zero, an anchor; saves input, weight, mask and anchor.

    The output itself is not saved, so that the caller may change it in place, as that of stock's dropout.
    """
    input, weight, kept, anchor = ctx.saved_tensors
    needs = ctx.needs_input_grad
    if autograd.differentiable():
        grad_linear, grad_bias = torch.where(kept, grad / (1 - ctx.p), 0) + anchor.sum(1, keepdim=True), None
    else:
        grad_linear, grad_bias = _backward[ctx.backend](grad, kept.to(grad.dtype), ctx.p, needs[2])
    return *gradients(grad_linear, grad_bias, input, weight, needs), None


def _python(input: Tensor, weight: Tensor, bias: Tensor | None, p: float, training: bool) -> Tensor:
    """Run the kernel, or linear+ReLU and then torch's dropout.

    The latter where nothing is random, under torch.func, whose rules for random numbers are torch's own, and where the
    stock layers run, so that torch's random stream is used as they use it.
    """
    _check_probability(p)
    if training and 0 < p < 1 and not torch._C._are_functorch_transforms_active():
        route, prepared = OP.route((input, weight, bias))
        if route.backend != "torch":
            # Drawn on the device by torch's generator: it obeys manual_seed, checkpointing repeats it, and a CUDA graph
            # draws another at each replay.
            seed = torch.randint(2**62, (1,), dtype=torch.int64, device=input.device)
            return by_rows(OP.run, *prepared, seed, float(p), route.backend)
    return F.dropout(LINEAR_RELU.python(input, weight, bias), p, training)


def _check_probability(p: object) -> None:
    if isinstance(p, bool) or not isinstance(p, (int, float)):
        raise checks.wrong(OP.function, "p", "a probability", repr(p), TypeError)
    if not 0 <= p <= 1:
        raise checks.wrong(OP.function, "p", "a probability from 0 to 1", p, ValueError)


def _plan(*arguments: Any) -> plans.Plan:
    *layer, p, training = arguments
    _check_probability(p)
    if not isinstance(training, bool):
        return None
    if training and 0 < p < 1 and OP.route(tuple(layer))[0].backend != "torch":
        return None
    plan = plans.plan(LINEAR_RELU, *layer)
    return plan and {**plan, "constants": (float(p),), "training": training}


OP.python = _python
OP.planned = fronted(OP.stem, _plan, lambda *arguments: LINEAR_RELU.prepare(*arguments[:3]), _python)
