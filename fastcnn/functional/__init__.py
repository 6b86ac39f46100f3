"""The fused stages as functions, with the argument order of ``torch.nn.functional``.

Every function takes what its torch counterpart takes, on any device and in any dtype, and returns the same numbers:
the error against float64 is at most twice that of the stock operations. The backend decides which code runs
(:func:`fastcnn.use_backend`). Gradients flow to every floating-point argument; ``torch.compile``, ``torch.func`` and
second derivatives work.

Errors: ``TypeError``, ``ValueError`` or ``RuntimeError``, as torch raises for the same mistake; the message names the
argument, what was expected and what was given. An explicitly chosen backend raises ``RuntimeError`` for a call that it
does not support.
"""

from fastcnn.functional.layers import (
    add_relu,
    conv2d_relu,
    conv2d_relu_max_pool2d,
    linear_relu,
    linear_relu_dropout,
    max_pool2d,
)
from fastcnn.functional.norms import (
    batch_norm_relu,
    batch_norm_relu_max_pool2d,
    local_response_norm,
    local_response_norm_max_pool2d,
    normalize,
)

__all__ = [
    "add_relu",
    "batch_norm_relu",
    "batch_norm_relu_max_pool2d",
    "conv2d_relu",
    "conv2d_relu_max_pool2d",
    "linear_relu",
    "linear_relu_dropout",
    "local_response_norm",
    "local_response_norm_max_pool2d",
    "max_pool2d",
    "normalize",
]
