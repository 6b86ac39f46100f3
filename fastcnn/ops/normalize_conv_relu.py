"""Normalization joined with the convolution that follows and its ReLU: ``normalize_conv_relu``, and autograd.

Only some algorithms normalize images within the convolution's kernel (`JOINED`). With the others the two functions run
one after another, and so they do under `auto` unless a tuning table names a joined kernel.
"""

from collections import namedtuple
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from fastcnn.backend import JOINED
from fastcnn.ops import autograd, convolution, normalize
from fastcnn.ops.conv_relu import OP
from fastcnn.ops.record import IMAGES, POOL, Op
from fastcnn.route import choose

# What a convolution's gradients read of a context, as a joined stage has it.
Context = namedtuple(
    "Context", "saved_tensors needs_input_grad settings backend window before masked", defaults=[None, False]
)


def _of_images(of_weights: Callable[..., Any]) -> Callable[..., Any]:
    """Return a convolution's fake kernel, or its count of FLOPs, for images that are normalized on their way."""
    return lambda images, mean, std, *others: of_weights(images, *others)


def joined(stem: str, name: str, separate: Op) -> Callable[..., Any]:
    """Return what runs a stage that begins with a normalization: in one kernel if there is one, else in two steps.

    Its Function, of that name, saves images, mean, std, and what the Function of the stage without the normalization
    saves after its input. The backward normalizes again.
    """
    op = Op(stem, separate.function, IMAGES, *separate.groups[1:], backends=("triton",), product="conv")
    op.forward(_of_images(convolution.fake), _of_images(convolution.flops))
    pools, separate_gradients = POOL in op.groups, separate.gradients

    def saves(ctx: Any, inputs: tuple[Any, ...], output: Any) -> tuple[Tensor, ...]:
        return *inputs[:4], *(output[1:] if pools else (output,))

    @op.differentiable(name, *("settings", "window")[: 1 + pools], saves=saves, anchored=pools)
    def gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, mean, std, weight, *others = ctx.saved_tensors
        needs, normalized = (ctx.needs_input_grad[0], *ctx.needs_input_grad[3:]), input
        if needs[0] or needs[1]:
            run = normalize.reference if autograd.differentiable() else normalize.OP.values[ctx.backend]
            normalized = run(input, mean, std, weight.dtype)
        window = ctx.window if pools else None
        context = Context((normalized, weight, *others), needs, ctx.settings, ctx.backend, window)
        grad_input, *gradients = separate_gradients(context, grad)
        if grad_input is not None:
            grad_input = normalize.input_gradient(grad_input, std, input.dtype)
        return grad_input, None, None, *gradients

    def run(*arguments: Any) -> Any:
        images, layer = arguments[: len(IMAGES.parameters)], arguments[len(IMAGES.parameters) :]
        if (output := _run_joined(op, separate, images, layer)) is not None:
            return output
        rest = separate.python if is_compiling() else separate.planned
        return rest(normalize.normalize(*images), *layer)

    return run


def _run_joined(op: Op, separate: Op, images: tuple[Any, ...], layer: tuple[Any, ...]) -> Tensor | None:
    input, mean, std, dtype = images[0], *normalize.prepare(op.function, *images)
    if torch._C._are_functorch_transforms_active() or normalize.refuse(input, mean, std, dtype):
        return None

    def prepare(*_: Any) -> Any:
        like = torch.empty_like(input, dtype=dtype)  # stands for the normalized images; never filled
        return separate.prepare(like, *layer)

    route, call = choose(op.stem, op.function, images + layer, prepare, separate.refuse)
    backend, algorithm, _ = route
    if algorithm is None or "+" in algorithm or backend not in JOINED.get(algorithm.partition(":")[0], ()):
        return None  # our gradient kernels read normalized images
    like, weight, bias, settings, *window = call
    if like.shape != input.shape or like.dtype != dtype:  # padded or cast before: no kernel does that
        return None
    call = mean, std, weight, bias, settings.running(algorithm), *window, backend
    output: Tensor = autograd.with_batch(op.run, input, *call)
    return output


normalize_conv_relu = joined("normalize_conv_relu", "NormalizeConvReLU", OP)
