"""Rows of convolutions on the CPU that run in channels_last, though their input and output are NCHW.

torch's float32 convolution computes blocks of channels, which channels_last holds as they are; NCHW is written in a
pass of its own. In inference a row of convolutions saves that pass where there are many activations for its weights,
which torch turns at each call. (In training the weights' gradients would come in other strides than stock's.)
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastcnn.backend import chosen
from fastcnn.overrides import is_watched
from fastcnn.shapes import memory_format

LEAST_ACTIVATIONS = 2**18


def pays(input: Tensor, weights: Sequence[Tensor], stride: tuple[int, int]) -> bool:
    """Whether a row of convolutions in inference is faster in channels_last: measured with AlexNet and VGG-16.

    Args:
        input: (N, C, H, W), of the first convolution.
        weights: of the convolutions.
        stride: of the first.
    """
    if chosen() != "auto" or type(input) is not Tensor or input.dim() != 4:
        return False
    pixels = input.shape[0] * (input.shape[2] // stride[0]) * (input.shape[3] // stride[1])
    activations = pixels * weights[0].shape[0]
    if activations < max(LEAST_ACTIVATIONS, sum(weight.numel() for weight in weights) // 2):
        return False
    tensors = (input, *weights)
    return (
        all(each.is_cpu and each.dtype == torch.float32 for each in tensors)
        and all(memory_format(each) == torch.contiguous_format for each in tensors)
        and torch.backends.mkldnn.is_available()
        and not (torch.is_autocast_enabled("cpu") or torch._C._are_functorch_transforms_active() or is_watched())
    )


def turn(input: Tensor) -> Tensor:
    """Copy NCHW pixels to channels_last, whose strides they then have even where there is one channel."""
    return torch.empty_like(input, memory_format=torch.channels_last).copy_(input)


def turn_back(output: Tensor) -> Tensor:
    """Copy to NCHW, with the strides of a contiguous tensor even where there is one pixel."""
    return output.clone(memory_format=torch.contiguous_format)
