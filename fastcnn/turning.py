"""Rows of convolutions on the CPU that run in channels_last, though their input and output are NCHW.

torch's float32 convolution computes blocks of channels, which channels_last holds as they are; NCHW is written in a
pass of its own. A row of convolutions saves that pass where there are many activations for its weights, which torch
turns at each call; before the first convolution with more weights than activations it is turned back. The gradients of
the input and of the weights keep stock's strides (`with_gradient_as_it_lies`).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, is_grad_enabled, nn
from torch.compiler import is_dynamo_compiling

from fastcnn.backend import chosen
from fastcnn.overrides import is_watched
from fastcnn.roles import BLOCK, HOOKS, IDENTITY, role_of, roles_of
from fastcnn.shapes import memory_format

LEAST_ACTIVATIONS = 2**18
_ROLES_IN_BLOCKS = frozenset({"conv", "bn", "relu", IDENTITY})  # of layers that read no strides
_turned = ContextVar("_turned", default=False)  # whether this thread runs a turned row


def pays(input: Any, row: tuple[Any, ...]) -> bool:
    """Whether a row of layers is faster in channels_last: measured with AlexNet, VGG-16, MnistCNN and ResNetCifar.

    The first layer is a convolution or a block, the others are such or run in either layout too.
    """
    if type(input) is not Tensor or not input.is_cpu or input.dim() != 4 or chosen() != "auto":
        return False
    if _activations(input, _convolutions(row[0])[0]) < LEAST_ACTIVATIONS or not pays_still(input, row[0]):
        return False
    if input.shape[1] > 1 and _later_activations(input, row) < input.numel():
        return False  # turning the input would take longer than what it saves
    weights = [conv.__dict__["_parameters"].get("weight") for layer in row for conv in _convolutions(layer)]
    if any(weight is None for weight in weights):
        return False  # a look at a weight that is computed may change it
    tensors = (input, *weights)
    return (
        all(each.is_cpu and each.dtype == torch.float32 for each in tensors)
        and all(memory_format(each) == torch.contiguous_format for each in tensors)
        and torch.backends.mkldnn.is_available()
        and not (torch.is_autocast_enabled("cpu") or torch._C._are_functorch_transforms_active() or is_watched())
        and all(_is_plain(layer) for layer in row if role_of(layer) == BLOCK)
    )


def pays_still(input: Tensor, layer: Any) -> bool:
    """Whether a layer of a turned row is no slower turned: a convolution has as many activations as weights."""
    convolutions = _convolutions(layer)
    if not convolutions:
        return True
    return _activations(input, convolutions[0]) >= max(conv.weight.numel() for conv in convolutions)


def _convolutions(layer: Any) -> list[nn.Conv2d]:
    """Return a convolution, or those of a block."""
    if isinstance(layer, nn.Conv2d):
        return [layer]
    inner = layer.modules() if isinstance(layer, nn.Module) and role_of(layer) == BLOCK else ()
    return [each for each in inner if isinstance(each, nn.Conv2d)]


def _is_plain(block: nn.Module) -> bool:
    """Whether nothing in a block sees strides: neither a hook nor a layer of another kind."""
    layers = list(block.modules())[1:]
    rows = [layer for layer in layers if type(layer) is nn.Sequential]
    roles = roles_of(layer for layer in layers if type(layer) is not nn.Sequential)
    return _ROLES_IN_BLOCKS.issuperset(roles) and not any(vars(row)[hooks] for row in rows for hooks in HOOKS)


def _activations(input: Tensor, conv: nn.Conv2d) -> int:
    down, right = _steps(conv)
    return input.shape[0] * (input.shape[2] // down) * (input.shape[3] // right) * conv.weight.shape[0]


def _steps(layer: Any) -> tuple[int, int]:
    """Return a layer's strides, (rows, columns); 1 instead of what is no stride, as the layer itself says so."""
    stride = getattr(layer, "stride", 1)
    down, right = (stride, stride) if isinstance(stride, int) else stride
    return max(down, 1), max(right, 1)


def _later_activations(input: Tensor, row: tuple[Any, ...]) -> float:
    """Return about how many activations the convolutions after the first have."""
    places, total = float(input[:, 0].numel()), -float(_activations(input, _convolutions(row[0])[0]))
    for layer in row:
        convolutions = _convolutions(layer)
        down, right = _steps(convolutions[0] if convolutions else layer)
        places /= down * right
        total += places * sum(each.out_channels for each in convolutions)
    return total


def turn(input: Tensor) -> Tensor:
    """Copy NCHW pixels to channels_last, whose strides they then have even where there is one channel."""
    turned = torch.empty_like(input, memory_format=torch.channels_last)
    return turned.copy_(with_gradient_as_it_lies(input))


def turn_back(output: Tensor) -> Tensor:
    """Copy to NCHW, with the strides of a contiguous tensor even where there is one pixel."""
    return output.clone(memory_format=torch.contiguous_format)


@contextmanager
def turned() -> Iterator[None]:
    """Let this thread's convolutions give their weights' gradients stock's strides, while the block runs."""
    token = _turned.set(True)
    try:
        yield
    finally:
        _turned.reset(token)


def weight_of(weight: Tensor) -> Tensor:
    """Return a convolution's weight; in a turned row, `with_gradient_as_it_lies`."""
    return with_gradient_as_it_lies(weight) if not is_dynamo_compiling() and _turned.get() else weight


def with_gradient_as_it_lies(tensor: Tensor) -> Tensor:
    """Return a view of a contiguous tensor whose gradient becomes contiguous too: flattened, it has one layout."""
    return tensor.flatten().view_as(tensor) if is_grad_enabled() and tensor.requires_grad else tensor
