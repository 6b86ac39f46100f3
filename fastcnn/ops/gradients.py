"""The convolutions' own gradients: the operators ``dgrad`` and ``wgrad``, or torch's; and work shared between stages.

The incoming gradient of a stage comes with its ReLU mask or argmax codes. Our dgrad and wgrad kernels mask or unpool it
tile by tile; if torch computes one of the two gradients, one pass first materializes the gradient of the convolution's
output.

If only one convolution reads the output of a conv+ReLU, our dgrad of that convolution also applies the ReLU's mask and
sums the bias gradient of the conv+ReLU, which then skips its own pass.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastcnn.ops import convolution
from fastcnn.ops.record import Op
from fastcnn.shapes import Window, conv_memory_format


class Incoming(NamedTuple):
    """A stage's incoming gradient: of the output, with its ReLU mask; or pooled, with argmax codes and the pool."""

    grad: Tensor
    mask: Tensor | None = None
    pool: tuple[int, ...] = ()
    bias: Tensor | None = None  # the bias gradient, if it has been summed already


def _fake(like: Tensor, channels: int, bias_grad: bool, input: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return an empty gradient of `like`, the input or weight, and one for each of the channels if asked for."""
    gradient = torch.empty_like(like, memory_format=conv_memory_format(input, weight))
    return gradient, like.new_empty(channels if bias_grad else 0)


def _flops(grad: Tensor, mask: Any, input: Tensor, weight: Tensor, *settings: Any) -> int:
    return convolution.flops(input, weight, None, next(each for each in settings if isinstance(each, Window)))


_SOURCE = "Tensor grad, Tensor? mask, Tensor input, Tensor weight"
_SETTINGS = "str? config, int[] convolution, int[] pool"
_OP = Op("convolution_backward", "", backends=("triton",))
_dgrad = _OP.define(
    "dgrad",
    f"({_SOURCE}, bool mask_input, bool bias_grad, {_SETTINGS}) -> (Tensor grad_input, Tensor grad_input_bias)",
    lambda grad, mask, input, weight, mask_input, sums, *_: _fake(input, input.shape[1], sums, input, weight),
    _flops,
    stem="convolution.dgrad",
)
_wgrad = _OP.define(
    "wgrad",
    f"({_SOURCE}, bool bias_grad, {_SETTINGS}) -> (Tensor grad_weight, Tensor grad_bias)",
    lambda grad, mask, input, weight, sums, *_: _fake(weight, weight.shape[0], sums, input, weight),
    _flops,
    stem="convolution.wgrad",
)


def gradients(
    ctx: Any, input: Tensor, weight: Tensor, incoming: Incoming, one_pass: Callable[[bool], tuple[Tensor, Tensor]]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of input, weight and bias, each only if needed, by the algorithms of the context's settings.

    `one_pass` materializes the gradient of the convolution's output; with True, it also sums the bias gradient.
    """
    settings, needs = ctx.settings, ctx.needs_input_grad
    our_dgrad = needs[0] and settings.dgrad is not None
    our_wgrad = needs[1] and settings.wgrad is not None
    wants_bias = needs[2] and incoming.bias is None
    theirs = (needs[0] and not our_dgrad, needs[1] and not our_wgrad)
    if incoming.mask is not None and (any(theirs) or (wants_bias and not our_wgrad)):
        grad, bias = one_pass(wants_bias)
        incoming, wants_bias = Incoming(grad, bias=bias), False
    elif wants_bias and not our_wgrad:
        incoming, wants_bias = incoming._replace(bias=incoming.grad.sum((0, 2, 3))), False
    grad_input, grad_weight = convolution.gradients(incoming.grad, input, weight, settings, theirs)
    grad_bias = incoming.bias
    numbers = settings.operands()[0], incoming.pool
    if our_dgrad:
        before = ctx.before
        sums = before is not None and before.needs_input_grad[2]
        grad_input, bias_before = _dgrad[ctx.backend](
            incoming.grad, incoming.mask, input, weight, before is not None, sums, settings.dgrad or None, *numbers
        )
        if before is not None:
            before.bias_sum = bias_before if sums else None
    if our_wgrad:
        grad_weight, bias = _wgrad[ctx.backend](
            incoming.grad, incoming.mask, input, weight, wants_bias, settings.wgrad or None, *numbers
        )
        grad_bias = bias if wants_bias else grad_bias
    return grad_input, grad_weight, grad_bias if needs[2] else None


def only_reader(activations: Any) -> None:
    """Note that only the next stage reads these activations, so that it may mask their gradient."""
    if not torch.compiler.is_compiling():
        activations.read_once = True  # an attribute, as that costs least: most stages never read it


def stock_gradients(
    ctx: Any, grad: Tensor, input: Tensor, weight: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return differentiable gradients of input, weight and bias from that of the convolution's output.

    This backward builds a graph that reads the output of the stage before too, which so masks its gradient itself.
    """
    if ctx.before is not None:
        ctx.before.masked, ctx.before = False, None
    needs = ctx.needs_input_grad
    grad_bias = grad.sum((0, 2, 3)) if needs[2] else None
    return *convolution.gradients(grad, input, weight, ctx.settings, needs), grad_bias


def stage_before(input: Tensor, settings: convolution.Convolution) -> Any:
    """Return the autograd node of the conv+ReLU whose mask our dgrad will apply, and mark it as masked; or None."""
    if settings.dgrad is None or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return None
    node: Any = input.grad_fn if getattr(input, "read_once", False) else None
    if getattr(node, "masked", None) is not False:  # only the node of a conv_relu has the attribute
        return None
    node.masked = True
    return node
