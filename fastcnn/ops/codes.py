"""Argmax codes in stock operations: converted to torch's indices, and used to unpool."""

import torch
from torch import Tensor

from fastcnn.shapes import RELU_OFF, Window


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


def unpool(
    grad: Tensor, codes: Tensor, window: Window, height: int, width: int, anchor: Tensor | None = None
) -> Tensor:
    """Unpool gradients to the places in the codes, in stock operations: (N, C, OH, OW) -> (N, C, height, width).

    The result also depends on the anchor, (N, 0): see `autograd.anchor`.
    """
    index = codes_to_indices(codes, window, width)
    if anchor is None:
        anchor = grad.new_empty(grad.shape[0], 0)
    plane = anchor.sum(1, dtype=grad.dtype)[:, None, None].expand(*grad.shape[:2], height * width)
    plane = plane.scatter_add(2, index.flatten(2), torch.where(codes == RELU_OFF, 0, grad).flatten(2))
    return plane.unflatten(2, (height, width))
