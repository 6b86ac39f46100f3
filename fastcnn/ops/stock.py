"""Stock operations: ReLU and max-pool as the references run them; argmax codes as indices, and to unpool by."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcnn.overrides import is_watched
from fastcnn.shapes import RELU_OFF, Window


def relu(activations: Tensor) -> Tensor:
    """Return the ReLU of activations that nothing else reads, in place where no other code can see the difference.

    Modes see it (selective checkpointing keeps the convolution's output), and so do compiled or traced graphs.
    """
    return F.relu(activations) if _shows(activations) else torch.relu_(activations)


def max_pool(
    input: Tensor, kernel_size: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool, indices: Any = False
) -> Any:
    """Return what ``F.max_pool2d`` returns; by the faster ``torch.max_pool2d`` where no mode or graph sees the call."""
    if indices or _shows(input):
        return F.max_pool2d(input, kernel_size, stride, padding, dilation, ceil_mode, indices)
    return torch.max_pool2d(input, kernel_size, () if stride is None else stride, padding, dilation, ceil_mode)


def _shows(tensor: Tensor) -> bool:
    return type(tensor) is not Tensor or torch.compiler.is_compiling() or is_watched()


def codes_to_indices(codes: Tensor, window: Window, width: int) -> Tensor:
    """Return torch's int64 indices into the H*W plane from codes: (N, C, OH, OW).

    Where ReLU is off or the window covers no pixel, the index is 0: mask it out.
    """
    columns = window.size[1]
    place = codes.to(torch.int64)
    row = _first(codes.shape[-2], window, 0, codes)[:, None] + place // columns * window.dilation[0]
    column = _first(codes.shape[-1], window, 1, codes) + place % columns * window.dilation[1]
    return torch.where(codes == RELU_OFF, 0, row * width + column)


def _first(count: int, window: Window, axis: int, like: Tensor) -> Tensor:
    return torch.arange(count, device=like.device) * window.stride[axis] - window.padding[axis]


def unpool(grad: Tensor, codes: Tensor, window: Window, height: int, width: int, anchor: Tensor) -> Tensor:
    """Unpool gradients to the places in the codes, in stock operations: (N, C, OH, OW) -> (N, C, height, width).

    The result also depends on the anchor, (N, 0): see `autograd.anchor`.
    """
    index = codes_to_indices(codes, window, width)
    plane = anchor.sum(1, dtype=grad.dtype)[:, None, None].expand(*grad.shape[:2], height * width)
    plane = plane.scatter_add(2, index.flatten(2), torch.where(codes == RELU_OFF, 0, grad).flatten(2))
    return plane.unflatten(2, (height, width))
