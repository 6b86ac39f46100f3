"""Normalizations, each with the layers that follow it."""

import torch
from torch import Tensor
from torch.compiler import is_compiling

from fastcnn.ops import normalize as normalization
from fastcnn.ops.bn_relu import OP as BN_RELU
from fastcnn.ops.bn_relu_pool import OP as BN_RELU_POOL
from fastcnn.ops.lrn import OP as LRN
from fastcnn.ops.lrn_pool import OP as LRN_POOL
from fastcnn.ops.normalize import Constants
from fastcnn.shapes import Size


def local_response_norm(input: Tensor, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0) -> Tensor:
    """Normalize each value by its neighbours in the channel axis, as ``torch.nn.functional.local_response_norm``.

    ``y = x / (k + alpha / size * sum of x**2 over size channels) ** beta`` (Krizhevsky et al., 2012, section 3.3; the
    paper's alpha is torch's alpha / size). Arithmetic is in float32.

    Args:
        input: (N, C, *), three or more axes.
        size: channels in the window, size // 2 of them before the value's own.
        alpha, beta, k: the formula's constants.

    Returns:
        The shape and dtype of `input`, under autocast too (torch turns to float32 there). A kernel's output is
        contiguous, or channels_last where `input` is; stock also keeps the strides of a transposed input.

    Raises TypeError for arguments of another type, ValueError for an `input` of fewer than three axes, RuntimeError
    for a `size` that is not positive or not a 64-bit integer.

    Example:
        >>> import torch, fastcnn.functional as FF
        >>> FF.local_response_norm(torch.ones(1, 4, 2, 2), size=3, alpha=3.0, beta=1.0)[0, :, 0, 0]
        tensor([0.3333, 0.2500, 0.2500, 0.3333])
    """
    run = LRN.python if is_compiling() else LRN.planned
    return run(input, size, alpha, beta, k)


def local_response_norm_max_pool2d(
    input: Tensor,
    size: int,
    alpha: float = 1e-4,
    beta: float = 0.75,
    k: float = 1.0,
    *,
    pool_size: Size,
    pool_stride: Size | None = None,
    pool_padding: Size = 0,
    pool_ceil_mode: bool = False,
) -> Tensor:
    """Normalize across channels, then max-pool: ``F.max_pool2d(F.local_response_norm(...), ...)`` in one stage.

    Args:
        input: (N, C, H, W); NCHW or channels_last.
        size, alpha, beta, k: of the normalization, as in :func:`local_response_norm`.
        pool_size, pool_stride, pool_padding, pool_ceil_mode: of the pool, as in :func:`conv2d_relu_max_pool2d`.

    Returns:
        (N, C, OH, OW), in the input's dtype.

    Raises what :func:`local_response_norm` raises, and RuntimeError for shapes and sizes that do not go together.

    Example:
        >>> import torch, fastcnn.functional as FF
        >>> FF.local_response_norm_max_pool2d(torch.randn(1, 8, 7, 7), 5, pool_size=3, pool_stride=2).shape
        torch.Size([1, 8, 3, 3])
    """
    run = LRN_POOL.python if is_compiling() else LRN_POOL.planned
    return run(input, size, alpha, beta, k, pool_size, pool_stride, pool_padding, pool_ceil_mode)


def batch_norm_relu(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Normalize each channel and apply ReLU: ``F.relu(F.batch_norm(...))`` in one stage.

    ``y = relu((x - mean) / sqrt(variance + eps) * weight + bias)`` (Ioffe, Szegedy, "Batch Normalization", 2015); in
    training with the input's own mean and biased variance over all but the channels, else with the running ones. The
    backward needs the input and two numbers a channel. Arithmetic is in float32.

    Args:
        input: (N, C, *), two or more axes; kernels take up to five.
        running_mean, running_var: (C,), float32 or the input's dtype; in training they are updated in place, the
            variance with its unbiased estimate, and may be None.
        weight, bias: (C,), float32 or the input's dtype, or None for ones and zeros.
        training: whether the input's own statistics are used.
        momentum: the weight of the new value in the running statistics.
        eps: added to the variance.

    Returns:
        The shape and dtype of `input`.

    Raises TypeError for arguments of another type, ValueError in training for one value a channel, and for a negative
    eps or, in training, zero; RuntimeError for shapes or devices that do not go together, or running statistics
    missing outside training.

    Example:
        >>> import torch, fastcnn.functional as FF
        >>> FF.batch_norm_relu(torch.tensor([[1.0], [3.0]]), None, None, training=True, eps=1e-12)
        tensor([[0.],
                [1.]])
    """
    run = BN_RELU.python if is_compiling() else BN_RELU.planned
    return run(input, running_mean, running_var, weight, bias, training, momentum, eps)


def batch_norm_relu_max_pool2d(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    pool_size: Size,
    pool_stride: Size | None = None,
    pool_padding: Size = 0,
    pool_ceil_mode: bool = False,
) -> Tensor:
    """Normalize, apply ReLU and max-pool: ``F.max_pool2d(F.relu(F.batch_norm(...)), ...)`` in one stage.

    Args:
        input: (N, C, H, W); NCHW or channels_last.
        running_mean, running_var, weight, bias, training, momentum, eps: as in :func:`batch_norm_relu`.
        pool_size, pool_stride, pool_padding, pool_ceil_mode: of the pool, as in :func:`conv2d_relu_max_pool2d`.

    Returns:
        (N, C, OH, OW), in the input's dtype. The backward keeps the input and one byte a pooled value.

    Raises what :func:`batch_norm_relu` raises, and RuntimeError for shapes and sizes that do not go together.

    Example:
        >>> import torch, fastcnn.functional as FF
        >>> x, mean, variance = torch.randn(2, 8, 6, 6), torch.zeros(8), torch.ones(8)
        >>> FF.batch_norm_relu_max_pool2d(x, mean, variance, pool_size=2).shape
        torch.Size([2, 8, 3, 3])
    """
    run = BN_RELU_POOL.python if is_compiling() else BN_RELU_POOL.planned
    return run(
        input, running_mean, running_var, weight, bias, training, momentum, eps,
        pool_size, pool_stride, pool_padding, pool_ceil_mode,
    )  # fmt: skip


def normalize(input: Tensor, mean: Constants, std: Constants, dtype: torch.dtype | None = None) -> Tensor:
    """Normalize images: ``(x - mean) / std``, where bytes stand for 0 to 1; in one pass, the cast included.

    As ``torchvision.transforms.v2.ToDtype(float32, scale=True)`` and ``Normalize``. Kernels: backend ``triton``; the
    other backends run torch's operations.

    Args:
        input: (N, C, H, W) or (C, H, W); uint8 from 0 to 255, or floating, as a rule from 0 to 1.
        mean, std: a number, or one for each channel, in units of images from 0 to 1. Tensors on the input's device
            save a copy at each call.
        dtype: of the output. None means the autocast dtype under autocast, else the input's, for bytes float32.

    Returns:
        The shape and memory format of `input`.

    Raises TypeError for an `input` or `dtype` of another kind and constants that are not numbers, ValueError for a
    `std` of 0, RuntimeError for another number of constants than channels, or no image.

    Example:
        >>> import torch, fastcnn.functional as FF
        >>> FF.normalize(torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 2), 0.5, 0.25)
        tensor([[[-2.,  2.]]])
    """
    return normalization.normalize(input, mean, std, dtype)
