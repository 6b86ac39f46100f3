"""Normalization joined with the convolution that follows and its ReLU: ``normalize_conv_relu``, and autograd.

Only some algorithms normalize images within the convolution's kernel (`JOINED`). With the others the two functions run
one after another, and so they do under `auto` unless a tuning table names a joined kernel.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastcnn.algorithms import JOINED
from fastcnn.ops import autograd, checks, convolution, normalize
from fastcnn.ops.conv_relu import _backward
from fastcnn.ops.convolution import Convolution, gradients, prepare
from fastcnn.ops.record import CONVOLUTION, IMAGES, Op, runner
from fastcnn.route import choose


class Joined(NamedTuple):
    """A checked call that one kernel can run."""

    input: Tensor
    mean: Tensor
    std: Tensor
    weight: Tensor
    bias: Tensor | None
    settings: Convolution
    backend: str


def of_images(of_weights: Callable[..., Any]) -> Callable[..., Any]:
    """Return a convolution's fake kernel, or its count of FLOPs, for images that are normalized on their way."""
    return lambda images, mean, std, *others: of_weights(images, *others)


OP = Op("normalize_conv_relu", "conv2d_relu", IMAGES, CONVOLUTION, backends=("triton",), product="conv")
_forward = OP.forward(of_images(convolution.fake), of_images(convolution.flops))


class NormalizeConvReLU(torch.autograd.Function):
    """(N, C, H, W) -> (N, C_out, OH, OW); saves images, weight and output, and normalizes again for the backward."""

    @staticmethod
    def forward(
        input: Tensor,
        mean: Tensor,
        std: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        settings: Convolution,
        backend: str,
    ) -> Tensor:
        return _forward[backend](input, mean, std, weight, bias, *settings.operands())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, mean, std, weight, _, ctx.settings, ctx.backend = inputs
        ctx.save_for_backward(input, mean, std, weight, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *images, weight, output = ctx.saved_tensors
        needs = ctx.needs_input_grad
        if autograd.differentiable():
            grad_conv = autograd.relu_gradient(grad, output)
            grad_bias = grad_conv.sum((0, 2, 3)) if needs[4] else None
        else:
            grad_conv, grad_bias = _backward[ctx.backend](grad, output, needs[4])
        grad_input, grad_weight = image_gradients(grad_conv, images, weight, ctx.settings, ctx.backend, needs)
        return grad_input, None, None, grad_weight, grad_bias if needs[4] else None, None, None


def image_gradients(
    grad: Tensor, images: list[Tensor], weight: Tensor, settings: Convolution, backend: str, needs: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of images, mean and std being (input, mean, std), and of the weight; each only if needed."""
    input, mean, std = images
    if not (needs[0] or needs[3]):
        return None, None
    if autograd.differentiable():
        normalized = normalize.reference(input, mean, std, weight.dtype)
    else:
        normalized = normalize.forward[backend](input, mean, std, weight.dtype)
    grad_input, grad_weight = gradients(grad, normalized, weight, settings, (needs[0], needs[3]))
    return None if grad_input is None else normalize.input_gradient(grad_input, std, input.dtype), grad_weight


_run = runner(NormalizeConvReLU, _forward)


def joined(
    op: Op, norm_arguments: tuple[Any, ...], layer: tuple[Any, ...], pool: tuple[Any, ...] = ()
) -> Joined | None:
    """Return a call that one kernel can run, or None if normalization and convolution are to run separately.

    Args:
        op: the joined stage.
        norm_arguments: of `normalize`, the images first.
        layer: the convolution's arguments but for its input.
        pool: the arguments of a pool that follows.
    """
    input, *constants = norm_arguments
    mean, std, dtype = normalize.prepare(op.function, input, *constants)
    if torch._C._are_functorch_transforms_active() or normalize.refuse(input, mean, std, dtype):
        return None

    def prepared(*_: Any) -> tuple[Tensor, Tensor, Tensor | None, Convolution]:
        like = torch.empty_like(input, dtype=dtype)  # stands for the normalized images; never filled
        return prepare(op.function, like, *layer)

    route, call = choose(op.stem, op.function, (*norm_arguments, *layer, *pool), prepared, _refuse)
    backend, algorithm, _ = route
    if algorithm is None or "+" in algorithm or backend not in JOINED.get(algorithm.partition(":")[0], ()):
        return None  # our gradient kernels read normalized images
    images, weight, bias, settings = call
    if images.shape != input.shape or images.dtype != dtype:  # padded or cast before: no kernel does that
        return None
    return Joined(input, mean, std, weight, bias, settings.running(algorithm), backend)


def _refuse(images: Tensor, *_: Any) -> str:
    return checks.refuse_dtype(images)


def normalize_conv_relu(*arguments: Any) -> Tensor | None:
    """Run the whole stage in one kernel, or return None."""
    images, layer = OP.split(arguments)
    call = joined(OP, images, layer)
    return None if call is None else autograd.with_batch(_run, *call)
