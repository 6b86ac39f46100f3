"""Batch norm and ReLU: the operators ``bn_relu``, ``bn_relu_statistics`` and ``bn_relu_backward``, and autograd.

In training one pass takes the statistics and one normalizes; backward is one pass for the two sums of a batch norm's
gradient and one that writes it. Nothing is kept but the input and two numbers a channel: the ReLU's mask is computed
again from them.
"""

from collections.abc import Sequence
from functools import partial
from numbers import Real
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcnn.ops import autograd, checks, stock
from fastcnn.ops.record import BATCH_NORM, INPUT, Op, like
from fastcnn.route import Route
from fastcnn.shapes import BatchNorm


def reference(*arguments: Any) -> Tensor:
    """Return batch norm and ReLU as torch runs them."""
    return stock.relu(F.batch_norm(*arguments))


def stock_output(input: Tensor, tensors: Sequence[Any], mode: BatchNorm) -> Tensor:
    """Return the output in stock, differentiable operations, leaving the running statistics alone."""
    mean, variance, weight, bias = tensors
    if mode.training:
        mean = variance = None
    return F.relu(F.batch_norm(input, mean, variance, weight, bias, mode.training, 0.0, mode.eps))


def stock_gradients(output: Tensor, grad: Tensor, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Return differentiable gradients of the tensors that require one."""
    wanted = [each for each in tensors if each is not None and each.requires_grad]
    found = iter(torch.autograd.grad(output, wanted, grad, create_graph=True, allow_unused=True))
    return tuple(next(found) if each is not None and each.requires_grad else None for each in tensors)


def spread(gradients: tuple[Any, ...], tensors: Sequence[Any]) -> tuple[Any, ...]:
    """Return the gradients of input, weight and bias among those of mean and variance, None for what is None."""
    grad_input, *others = gradients
    return grad_input, None, None, *(None if each is None else grad for each, grad in zip(tensors[2:], others))


def _fake_statistics(input: Tensor) -> Tensor:
    return input.new_empty((3, input.shape[1]), dtype=torch.float32)


def fake_gradients(input: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return empty tensors like the gradients of input, weight and bias."""
    sums = [input.new_empty(input.shape[1], dtype=torch.float32) for _ in range(2)]
    return like(input), sums[0], sums[1]


GRADIENTS = "(Tensor grad_input, Tensor grad_weight, Tensor grad_bias)"


def prepare(
    function: str,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Any, ...]:
    """Check a batch norm's input, (N, C, *), the tensors (C,) of its channels, and its settings."""
    checks.check_tensor(function, "input", input)
    if input.dim() < 2:
        raise checks.wrong(function, "input", "(N, C, *), two or more axes", f"shape {tuple(input.shape)}")
    channels = input.shape[1]
    named = {"running_mean": running_mean, "running_var": running_var, "weight": weight, "bias": bias}
    for name, each in named.items():
        if each is None:
            continue
        checks.check_tensor(function, name, each)
        if each.numel() != channels:
            raise checks.wrong(function, name, f"shape ({channels},)", tuple(each.shape))
        if each.device != input.device:
            raise checks.wrong(function, name, f"a tensor on {input.device}, where 'input' is", each.device)
    checks.check_flag(function, "training", training)
    for name, value in (("momentum", momentum), ("eps", eps)):
        if not isinstance(value, Real):
            raise checks.wrong(function, name, "a number", repr(value), TypeError)
    if (running_mean is None) != (running_var is None):
        missing = "running_mean" if running_mean is None else "running_var"
        raise checks.wrong(function, missing, "both running statistics or neither", None, ValueError)
    if running_mean is None and not training:
        raise checks.wrong(function, "running_mean", "a Tensor unless training is True", None)
    if eps < 0 or (training and eps == 0):
        raise checks.wrong(function, "eps", "a positive number", eps, ValueError)
    if training and input.numel() == channels:
        got = f"shape {tuple(input.shape)}"
        raise checks.wrong(function, "input", "more than one value a channel in training", got, ValueError)
    return input, *named.values(), BatchNorm(training, momentum, float(eps))


def refuse(input: Tensor, *tensors: Any) -> str:
    """Say why no kernel takes these, or return an empty string."""
    if torch._C._are_functorch_transforms_active():
        return "has no rule for torch.func transforms of argument 'input'; backend 'torch' has"
    if reason := checks.refuse_dtype(input):
        return reason
    if input.dim() > 5:
        return f"takes argument 'input' with two to five axes, got shape {tuple(input.shape)}"
    for name, each in zip(("running_mean", "running_var", "weight", "bias"), tensors):
        if each is not None and each.dtype not in (torch.float32, input.dtype):
            return f"takes argument {name!r} in float32 or the dtype of 'input', {input.dtype}, got {each.dtype}"
    return ""


OP = Op(
    "bn_relu",
    "batch_norm_relu",
    INPUT,
    BATCH_NORM,
    stock=reference,
    prepare=prepare,
    refuse=refuse,
    takes_empty=False,
)
_statistics = OP.define("bn_relu_statistics", "(Tensor input) -> Tensor", _fake_statistics, stem="bn_statistics")
OP.forward(like)
_backward = OP.define(
    "bn_relu_backward",
    f"(Tensor grad, {OP.schema}, bool training) -> {GRADIENTS}",
    lambda grad, input, *_: fake_gradients(input),
)


@OP.differentiable("BatchNormReLU", "mode", saves=lambda ctx, inputs, output: inputs[:5])
def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """(N, C, *) -> the same; saves the input, mean, variance, weight and bias."""
    input, *tensors = ctx.saved_tensors
    if autograd.differentiable():
        found = stock_gradients(stock_output(input, tensors, ctx.mode), grad, input, *tensors[2:])
    else:
        found = _backward[ctx.backend](grad, input, *tensors, ctx.mode.eps, ctx.mode.training)
    return spread(found, tensors)


def launch(op: Op, route: Route, input: Tensor, *prepared: Any) -> Tensor:
    """Run the kernels of a prepared call; in training, take the input's statistics and update the running ones first.

    The kernels take mean, variance, weight and bias in float32.
    """
    mean, variance, weight, bias, mode, *window = prepared
    scale, shift = (None if each is None else each.float() for each in (weight, bias))
    if mode.training:
        with torch.no_grad():
            own_mean, own_variance, unbiased = _statistics[route.backend](input.detach()).unbind()
            _update(mean, own_mean, mode.momentum)
            _update(variance, unbiased, mode.momentum)
        mean, variance = own_mean, own_variance
    else:
        mean, variance = mean.float(), variance.float()
    output: Tensor = op.run(input, mean, variance, scale, shift, mode, *window, route.backend)
    return output


def _update(running: Tensor | None, batch: Tensor, momentum: float) -> None:
    if running is None:
        return
    if running.dtype == torch.float32:
        running.lerp_(batch, momentum)
    else:
        running.copy_(torch.lerp(running.float(), batch, momentum))


OP.runs(partial(launch, OP))
