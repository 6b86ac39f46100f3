"""Normalization joined with the convolution that follows and its ReLU: ``normalize_conv_relu``, and autograd.

Only some algorithms normalize images within the convolution's kernel (`JOINED`). With the others the two functions run
one after another, and so they do under `auto` unless a tuning table names a joined kernel.
"""

from collections import namedtuple
from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from fastcnn.algorithms import JOINED
from fastcnn.ops import autograd, checks, convolution, max_pool, normalize
from fastcnn.ops.conv_relu import OP as SEPARATE
from fastcnn.ops.convolution import Convolution, output_shape, prepare
from fastcnn.ops.record import CONVOLUTION, IMAGES, Op
from fastcnn.route import choose
from fastcnn.shapes import Window


def of_images(of_weights: Callable[..., Any]) -> Callable[..., Any]:
    """Return a convolution's fake kernel, or its count of FLOPs, for images that are normalized on their way."""
    return lambda images, mean, std, *others: of_weights(images, *others)


OP = Op("normalize_conv_relu", "conv2d_relu", IMAGES, CONVOLUTION, backends=("triton",), product="conv")
OP.forward(of_images(convolution.fake), of_images(convolution.flops))


@OP.differentiable("NormalizeConvReLU", "settings", saves=lambda ctx, inputs, output: (*inputs[:4], output))
def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """(N, C, H, W) -> (N, C_out, OH, OW); saves images, weight and output, and normalizes again for the backward."""
    return image_gradients(SEPARATE, ctx, grad)


# What a convolution's Function reads of its context, as a joined stage has it.
Context = namedtuple(
    "Context", "saved_tensors needs_input_grad settings backend window before masked", defaults=[None, False]
)


def image_gradients(separate: Op, ctx: Any, grad: Tensor, window: Window | None = None) -> tuple[Tensor | None, ...]:
    """Return the gradients of a joined stage: those of the convolution's, with the images normalized again.

    The joined stage has saved images, mean, std, and what the stage without the normalization saves after its input.
    """
    input, mean, std, weight, *others = ctx.saved_tensors
    needs, normalized = (ctx.needs_input_grad[0], *ctx.needs_input_grad[3:]), input
    if needs[0] or needs[1]:
        run = normalize.reference if autograd.differentiable() else normalize.OP.values[ctx.backend]
        normalized = run(input, mean, std, weight.dtype)
    context = Context((normalized, weight, *others), needs, ctx.settings, ctx.backend, window)
    grad_input, *gradients = separate.gradients(context, grad)
    if grad_input is not None:
        grad_input = normalize.input_gradient(grad_input, std, input.dtype)
    return grad_input, None, None, *gradients


def joined(op: Op, separate: Op) -> Callable[..., Any]:
    """Return what runs a stage that begins with a normalization: in one kernel if there is one, else in two steps."""

    def run(*arguments: Any) -> Any:
        if (output := _run_joined(op, *arguments)) is not None:
            return output
        images, *groups = op.split(arguments)
        rest = separate.python if is_compiling() else separate.planned
        return rest(normalize.normalize(*images), *chain.from_iterable(groups))

    return run


def _run_joined(op: Op, *arguments: Any) -> Tensor | None:
    (input, *constants), layer, *pools = op.split(arguments)
    mean, std, dtype = normalize.prepare(op.function, input, *constants)
    if torch._C._are_functorch_transforms_active() or normalize.refuse(input, mean, std, dtype):
        return None

    def prepared(*_: Any) -> tuple[Tensor, Tensor, Tensor | None, Convolution]:
        like = torch.empty_like(input, dtype=dtype)  # stands for the normalized images; never filled
        return prepare(op.function, like, *layer)

    route, call = choose(op.stem, op.function, arguments, prepared, checks.refuse_dtype)
    backend, algorithm, _ = route
    if algorithm is None or "+" in algorithm or backend not in JOINED.get(algorithm.partition(":")[0], ()):
        return None  # our gradient kernels read normalized images
    images, weight, bias, settings = call
    if images.shape != input.shape or images.dtype != dtype:  # padded or cast before: no kernel does that
        return None
    plane = output_shape(input, weight, settings.window(weight))
    windows = [max_pool.window_over(op.function, plane, *pool) for pool in pools]
    if any(checks.refuse_window("pool_size", window) for window in windows):
        return None
    settings = settings.running(algorithm)
    output: Tensor = autograd.with_batch(op.run, input, mean, std, weight, bias, settings, *windows, backend)
    return output


normalize_conv_relu = joined(OP, SEPARATE)
