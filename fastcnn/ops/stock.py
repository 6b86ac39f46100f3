"""The stock layers' ReLU and max-pool as the references run them."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcnn.overrides import is_watched


def relu(activations: Tensor) -> Tensor:
    """Return the ReLU of activations that nothing else reads, in place where no other code can see the difference.

    Modes see it (selective checkpointing keeps the convolution's output), and so do compiled or traced graphs.
    """
    return F.relu(activations) if _shows(activations) else torch.relu_(activations)


def max_pool(
    input: Tensor,
    kernel_size: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    ceil_mode: bool,
    return_indices: Any,
) -> Any:
    """Return what ``F.max_pool2d`` returns; by the faster ``torch.max_pool2d`` where no mode or graph sees the call."""
    if return_indices or _shows(input):
        return F.max_pool2d(input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)
    return torch.max_pool2d(input, kernel_size, () if stride is None else stride, padding, dilation, ceil_mode)


def pool(activations: Tensor, size: Any, stride: Any, padding: Any, ceil_mode: bool) -> Tensor:
    """Return the pooled activations of a stage that ends in a pool."""
    pooled: Tensor = max_pool(activations, size, stride, padding, 1, ceil_mode, False)
    return pooled


def _shows(tensor: Tensor) -> bool:
    return type(tensor) is not Tensor or torch.compiler.is_compiling() or is_watched()
