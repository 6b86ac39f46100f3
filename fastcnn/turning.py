"""Rows of convolutions on the CPU that run in channels_last, though their input and output are NCHW.

torch's float32 convolution computes blocks of channels, which channels_last holds as they are; NCHW is written in a
pass of its own. In inference a row of convolutions saves that pass where there are many activations for its weights,
which torch turns at each call; before the first convolution with more weights than activations it is turned back. (In
training the weights' gradients would come in other strides than stock's.)
"""

from typing import Any

import torch
from torch import Tensor, nn

from fastcnn.backend import chosen
from fastcnn.overrides import is_watched
from fastcnn.shapes import memory_format

LEAST_ACTIVATIONS = 2**18


def pays(input: Any, row: tuple[Any, ...]) -> bool:
    """Whether a row of layers in inference is faster in channels_last: measured with AlexNet and VGG-16.

    Args:
        input: of the first layer, a convolution: (N, C, H, W).
        row: convolutions and what else runs in either layout.
    """
    if type(input) is not Tensor or not input.is_cpu or input.dim() != 4 or chosen() != "auto":
        return False
    convolutions = [layer for layer in row if isinstance(layer, nn.Conv2d)]
    weights = [conv.__dict__["_parameters"].get("weight") for conv in convolutions]
    if any(weight is None for weight in weights):
        return False  # a look at a weight that is computed may change it
    if _activations(input, convolutions[0]) < LEAST_ACTIVATIONS or not pays_still(input, convolutions[0]):
        return False
    tensors = (input, *weights)
    return (
        all(each.is_cpu and each.dtype == torch.float32 for each in tensors)
        and all(memory_format(each) == torch.contiguous_format for each in tensors)
        and torch.backends.mkldnn.is_available()
        and not (torch.is_autocast_enabled("cpu") or torch._C._are_functorch_transforms_active() or is_watched())
    )


def pays_still(input: Tensor, layer: Any) -> bool:
    """Whether a layer of a turned row is no slower turned: a convolution has as many activations as weights."""
    return not isinstance(layer, nn.Conv2d) or _activations(input, layer) >= layer.weight.numel()


def _activations(input: Tensor, conv: nn.Conv2d) -> int:
    down, right = conv.stride
    return input.shape[0] * (input.shape[2] // down) * (input.shape[3] // right) * conv.weight.shape[0]


def turn(input: Tensor) -> Tensor:
    """Copy NCHW pixels to channels_last, whose strides they then have even where there is one channel."""
    return torch.empty_like(input, memory_format=torch.channels_last).copy_(input)


def turn_back(output: Tensor) -> Tensor:
    """Copy to NCHW, with the strides of a contiguous tensor even where there is one pixel."""
    return output.clone(memory_format=torch.contiguous_format)
