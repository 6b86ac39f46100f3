"""Batch norm and ReLU: the operators ``bn_relu``, ``bn_relu_statistics`` and ``bn_relu_backward``, and autograd.

In training one pass takes the statistics and one normalizes; backward is one pass for the two sums of a batch norm's
gradient and one that writes it. Nothing is kept but the input and two numbers a channel: the ReLU's mask is computed
again from them.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcnn.ops import autograd, checks, stock
from fastcnn.ops.record import BATCH_NORM, INPUT, Op
from fastcnn.shapes import memory_format


class Norm(NamedTuple):
    """Mean, variance, weight and bias as kernels take them: float32, (C,); weight and bias may be None."""

    mean: Tensor
    variance: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    training: bool  # whether mean and variance are the input's own

    def operands(self) -> tuple[Any, ...]:
        """Return the forward operators' arguments: all but `training`."""
        return self.mean, self.variance, self.weight, self.bias, self.eps


def reference(*arguments: Any) -> Tensor:
    """Return batch norm and ReLU as torch runs them."""
    return stock.relu(F.batch_norm(*arguments))


def stock_output(input: Tensor, norm: Norm) -> Tensor:
    """Return the output in stock, differentiable operations, leaving the running statistics alone."""
    mean, variance = (None, None) if norm.training else (norm.mean, norm.variance)
    return F.relu(F.batch_norm(input, mean, variance, norm.weight, norm.bias, norm.training, 0.0, norm.eps))


def stock_gradients(output: Tensor, grad: Tensor, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Return differentiable gradients of the tensors that require one."""
    wanted = [each for each in tensors if each is not None and each.requires_grad]
    found = iter(torch.autograd.grad(output, wanted, grad, create_graph=True, allow_unused=True))
    return tuple(next(found) if each is not None and each.requires_grad else None for each in tensors)


def _fake(input: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(input, memory_format=memory_format(input))


def _fake_statistics(input: Tensor) -> Tensor:
    return input.new_empty((3, input.shape[1]), dtype=torch.float32)


def fake_gradients(input: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return empty tensors like the gradients of input, weight and bias."""
    channels = input.shape[1]
    sums = [input.new_empty(channels, dtype=torch.float32) for _ in range(2)]
    return torch.empty_like(input, memory_format=memory_format(input)), sums[0], sums[1]


def _fake_backward(grad: Tensor, input: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return fake_gradients(input)


GRADIENTS = "(Tensor grad_input, Tensor grad_weight, Tensor grad_bias)"


def _prepare(
    input: Tensor, mean: Tensor | None, variance: Tensor | None, weight: Tensor | None, bias: Tensor | None, *rest: Any
) -> tuple[Any, ...]:
    checks.check_batch_norm(OP.function, input, mean, variance, weight, bias, *rest)
    return input, mean, variance, weight, bias


def refuse(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
) -> str:
    """Say why no kernel takes these, or return an empty string."""
    if torch._C._are_functorch_transforms_active():
        return "has no rule for torch.func transforms of argument 'input'; backend 'torch' has"
    if reason := checks.refuse_dtype(input):
        return reason
    if input.dim() > 5:
        return f"takes argument 'input' with two to five axes, got shape {tuple(input.shape)}"
    named = {"running_mean": running_mean, "running_var": running_var, "weight": weight, "bias": bias}
    for name, each in named.items():
        if each is not None and each.dtype not in (torch.float32, input.dtype):
            return f"takes argument {name!r} in float32 or the dtype of 'input', {input.dtype}, got {each.dtype}"
    return ""


OP = Op("bn_relu", "batch_norm_relu", INPUT, BATCH_NORM, stock=reference, prepare=_prepare, refuse=refuse)
_statistics = OP.define("bn_relu_statistics", "(Tensor input) -> Tensor", _fake_statistics, stem="bn_statistics")
_forward = OP.forward(_fake)
_backward = OP.define("bn_relu_backward", f"(Tensor grad, {OP.schema}, bool training) -> {GRADIENTS}", _fake_backward)


class BatchNormReLU(torch.autograd.Function):
    """(N, C, *) -> the same; saves the input, mean, variance, weight and bias."""

    @staticmethod
    def forward(
        input: Tensor,
        mean: Tensor,
        variance: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        training: bool,
        backend: str,
    ) -> Tensor:
        return _forward[backend](input, mean, variance, weight, bias, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.eps, ctx.training, ctx.backend = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, *tensors = ctx.saved_tensors
        mean, variance, weight, bias = tensors
        norm = Norm(mean, variance, weight, bias, ctx.eps, ctx.training)
        if autograd.differentiable():
            dx, grad_weight, grad_bias = stock_gradients(stock_output(input, norm), grad, input, norm.weight, norm.bias)
        else:
            dx, grad_weight, grad_bias = _backward[ctx.backend](grad, input, *norm)
        return dx, None, None, *given(norm, grad_weight, grad_bias), None, None, None


_apply = autograd.applier(BatchNormReLU)


def _run(
    input: Tensor, mean: Tensor, variance: Tensor, weight: Any, bias: Any, eps: float, training: bool, backend: str
) -> Any:
    if autograd.needs_grad(input, weight, bias):
        return _apply(input, mean, variance, weight, bias, eps, training, backend)
    return _forward[backend](input, mean, variance, weight, bias, eps)


def given(norm: Norm, grad_weight: Any, grad_bias: Any) -> tuple[Any, Any]:
    """Return the gradients of weight and bias, None for one that is None."""
    return None if norm.weight is None else grad_weight, None if norm.bias is None else grad_bias


def bn_relu(*arguments: Any) -> Tensor:
    """Run ``fastcnn.functional.batch_norm_relu``."""
    (input,), norm = OP.split(arguments)
    route, _ = OP.route(arguments, measured(*norm))
    if route.backend == "torch" or input.numel() == 0:  # nothing to launch a kernel for
        return OP.stock(*arguments)
    output: Tensor = _run(input, *prepare(route.backend, *arguments), route.backend)
    return output


def measured(mean: Any, variance: Any, weight: Any, bias: Any, training: bool, momentum: float, eps: float) -> str:
    """Return the name by which it was measured: with the input's own statistics, or with running ones."""
    return "bn_relu" if training is True else "bn_relu_running"


def prepare(
    backend: str,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> Norm:
    """Return what the kernels need; in training, take the input's statistics and update the running ones."""
    scale, shift = (None if each is None else each.float() for each in (weight, bias))
    if not training:
        mean, variance = running_mean.float(), running_var.float()  # type: ignore[union-attr]  # the check has seen
        return Norm(mean, variance, scale, shift, float(eps), False)
    with torch.no_grad():
        mean, variance, unbiased = _statistics[backend](input.detach()).unbind()
        _update(running_mean, mean, momentum)
        _update(running_var, unbiased, momentum)
    return Norm(mean, variance, scale, shift, float(eps), True)


def _update(running: Tensor | None, batch: Tensor, momentum: float) -> None:
    if running is None:
        return
    if running.dtype == torch.float32:
        running.lerp_(batch, momentum)
    else:
        running.copy_(torch.lerp(running.float(), batch, momentum))
