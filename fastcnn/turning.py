"""Rows of convolutions on the CPU that run in channels_last, though their input and output are NCHW.

torch's float32 convolution computes blocks of channels, which channels_last holds as they are; NCHW is written in a
pass of its own. A row of convolutions saves that pass where there are many activations for its weights, which torch
turns at each call; before the first convolution with too few activations it is turned back. The gradients of
the input and of the weights keep stock's strides (`with_gradient_as_it_lies`).
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, is_grad_enabled, nn
from torch.compiler import is_dynamo_compiling

from fastcnn.backend import chosen
from fastcnn.overrides import is_watched
from fastcnn.roles import BLOCK, GROUPS, HOOKS, IDENTITY, roles_of

LEAST_ACTIVATIONS = 2**18
LEAST_ACTIVATIONS_A_WEIGHT = 0.5
_ROLES_IN_BLOCKS = frozenset({"conv", "bn", "relu", IDENTITY})  # of layers that read no strides
_turned = ContextVar("_turned", default=False)  # whether this thread runs a turned row


Convolutions = list[list[nn.Conv2d]]  # of a row, by its layers


def pays(input: Any, row: tuple[Any, ...]) -> Convolutions:
    """Return the convolutions of a row that is faster in channels_last, or an empty list.

    Measured with AlexNet, VGG-16, MnistCNN and ResNetCifar. The first layer is a convolution or a block, the others are
    such or run in either layout too.
    """
    if type(input) is not Tensor or not input.is_cpu or input.dim() != 4 or chosen() != "auto":
        return []
    first = _convolutions(row[0])
    if _activations(input, first[0]) < LEAST_ACTIVATIONS or not pays_still(input, first):
        return []
    convolutions = [first, *map(_convolutions, row[1:])]
    if input.shape[1] > 1 and _later_activations(input, row, convolutions) < input.numel():
        return []  # turning the input would take longer than what it saves
    tensors = [input, *(conv.__dict__["_parameters"].get("weight") for each in convolutions for conv in each)]
    if (
        all(each is not None for each in tensors)  # a look at a weight that is computed may change it
        and all(each.is_cpu and each.dtype == torch.float32 and _is_in_order(each) for each in tensors)
        and torch.backends.mkldnn.is_available()
        and not (torch.is_autocast_enabled("cpu") or torch._C._are_functorch_transforms_active() or is_watched())
        and all(_is_plain(layer) for layer in row if _is_block(layer))
    ):
        return convolutions
    return []


def pays_still(input: Tensor, convolutions: list[nn.Conv2d]) -> bool:
    """Whether a layer of a turned row is no slower turned: a convolution has activations enough for its weights."""
    if not convolutions:
        return True
    return _activations(input, convolutions[0]) >= LEAST_ACTIVATIONS_A_WEIGHT * max(map(_weights, convolutions))


def _is_in_order(tensor: Tensor) -> bool:
    """Whether a tensor lies in NCHW: one pixel is contiguous in channels_last too, but its last stride is not 1."""
    return tensor.is_contiguous() and tensor.stride(-1) == 1


def _is_block(layer: Any) -> bool:
    return GROUPS.get(getattr(type(layer), "forward", None)) == BLOCK


def _convolutions(layer: Any) -> list[nn.Conv2d]:
    """Return a convolution, or those of a block."""
    if isinstance(layer, nn.Conv2d):
        return [layer]
    return [each for each in _within(layer) if isinstance(each, nn.Conv2d)] if _is_block(layer) else []


def _within(module: nn.Module) -> list[nn.Module]:
    """Return the modules in a module: `modules` takes longer, as it makes their names."""
    found: list[nn.Module] = []
    for child in module._modules.values():
        if child is not None:
            found += [child, *_within(child)]
    return found


def _is_plain(block: nn.Module) -> bool:
    """Whether nothing in a block sees strides: neither a hook nor a layer of another kind."""
    layers = _within(block)
    rows = [layer for layer in layers if type(layer) is nn.Sequential]
    roles = roles_of(layer for layer in layers if type(layer) is not nn.Sequential)
    return _ROLES_IN_BLOCKS.issuperset(roles) and not any(vars(row)[hooks] for row in rows for hooks in HOOKS)


def _activations(input: Tensor, conv: nn.Conv2d) -> int:
    down, right = _steps(conv)
    return input.shape[0] * (input.shape[2] // down) * (input.shape[3] // right) * conv.out_channels


def _weights(conv: nn.Conv2d) -> int:
    return conv.out_channels * (conv.in_channels // conv.groups) * math.prod(conv.kernel_size)


def _steps(layer: Any) -> tuple[int, int]:
    """Return a layer's strides, (rows, columns); 1 instead of what is no stride, as the layer itself says so."""
    stride = getattr(layer, "stride", 1)
    down, right = (stride, stride) if isinstance(stride, int) else stride
    return max(down, 1), max(right, 1)


def _later_activations(input: Tensor, row: tuple[Any, ...], convolutions: Convolutions) -> float:
    """Return about how many activations the convolutions after the first have."""
    places, total = input.numel() / input.shape[1], -float(_activations(input, convolutions[0][0]))
    for layer, within in zip(row, convolutions):
        down, right = _steps(within[0] if within else layer)
        places /= down * right
        total += places * sum(each.out_channels for each in within)
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
