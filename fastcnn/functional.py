"""The fused stages as functions, with the argument order of ``torch.nn.functional``.

Every function takes what its torch counterpart takes, on any device and in any dtype, and returns the same numbers:
the error against float64 is at most twice that of the stock operations. Which code runs is the backend's matter
(:func:`fastcnn.use_backend`). Gradients flow to every floating-point argument; ``torch.compile``, ``torch.func`` and
second derivatives work.

Errors: ``TypeError``, ``ValueError`` or ``RuntimeError``, as torch raises for the same mistake; the message names the
argument, what was expected and what came. An explicitly chosen backend that cannot serve a call raises
``RuntimeError``.
"""

from typing import Any, Literal, overload

from torch import Tensor

from fastcnn.ops import add_relu as addition
from fastcnn.ops import bn_relu, bn_relu_pool, conv_relu, conv_relu_pool, lrn, lrn_pool, max_pool
from fastcnn.ops import linear_relu as linear
from fastcnn.ops.gradients import only_reader as only_reader
from fastcnn.shapes import Size

__all__ = [
    "add_relu",
    "batch_norm_relu",
    "batch_norm_relu_max_pool2d",
    "conv2d_relu",
    "conv2d_relu_max_pool2d",
    "linear_relu",
    "local_response_norm",
    "local_response_norm_max_pool2d",
    "max_pool2d",
]


def conv2d_relu(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
) -> Tensor:
    """Convolve, add the bias and apply ReLU: ``F.relu(F.conv2d(...))`` in one stage.

    Args:
        input: (N, C_in, H, W) or (C_in, H, W); NCHW or channels_last.
        weight: (C_out, C_in / groups, KH, KW), dtype and device of `input`.
        bias: (C_out,), or None.
        stride: in pixels, one number or (rows, columns).
        padding: zeros on each side in pixels, or 'valid', or 'same' (stride 1; an even kernel pads one more at the
            bottom and right).
        dilation: distance of the kernel's places in pixels.
        groups: C_in and C_out are split into so many independent groups.

    Returns:
        (N, C_out, OH, OW) or (C_out, OH, OW), in the input's dtype; under autocast in the autocast dtype.

    Raises:
        TypeError: an argument is not a tensor or not an integer.
        RuntimeError: shapes, dtypes or devices do not go together.

    Example:
        >>> import torch, fastcnn.functional as FF
        >>> FF.conv2d_relu(torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3), torch.randn(4), padding=1).shape
        torch.Size([2, 4, 8, 8])
    """
    return conv_relu.conv_relu(input, weight, bias, stride, padding, dilation, groups)


def conv2d_relu_max_pool2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
    *,
    pool_size: Size,
    pool_stride: Size | None = None,
    pool_padding: Size = 0,
    pool_ceil_mode: bool = False,
) -> Tensor:
    """Convolve, add the bias, apply ReLU and max-pool: ``F.max_pool2d(F.relu(F.conv2d(...)), ...)`` in one stage.

    What the backward needs of the convolution's output is one byte a pooled value; the output itself is not kept.

    Args:
        input: (N, C_in, H, W) or (C_in, H, W); NCHW or channels_last.
        weight: (C_out, C_in / groups, KH, KW), dtype and device of `input`.
        bias: (C_out,), or None.
        stride, padding, dilation, groups: of the convolution, as in :func:`conv2d_relu`.
        pool_size: the pooling window in pixels, one number or (rows, columns).
        pool_stride: in pixels; None means `pool_size`.
        pool_padding: on each side in pixels, at most half of the window.
        pool_ceil_mode: whether a last, partial window counts.

    Returns:
        (N, C_out, OH, OW) or (C_out, OH, OW), in the input's dtype; under autocast in the autocast dtype.

    Raises:
        TypeError: an argument is not a tensor or not an integer.
        RuntimeError: shapes, dtypes or devices do not go together.

    Example:
        >>> import torch, fastcnn.functional as FF
        >>> x, weight = torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3)
        >>> FF.conv2d_relu_max_pool2d(x, weight, padding=1, pool_size=2).shape
        torch.Size([2, 4, 4, 4])
    """
    return conv_relu_pool.conv_relu_pool(
        input, weight, bias, stride, padding, dilation, groups, pool_size, pool_stride, pool_padding, pool_ceil_mode
    )


@overload
def max_pool2d(
    input: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    dilation: Size = 1,
    ceil_mode: bool = False,
    return_indices: Literal[False] = False,
) -> Tensor: ...


@overload
def max_pool2d(
    input: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    dilation: Size = 1,
    ceil_mode: bool = False,
    *,
    return_indices: Literal[True],
) -> tuple[Tensor, Tensor]: ...


@overload
def max_pool2d(
    input: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    dilation: Size = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any: ...


def max_pool2d(
    input: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    dilation: Size = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """Max-pool, as ``torch.nn.functional.max_pool2d``, keeping one byte a pooled value for the backward.

    Args:
        input: (N, C, H, W) or (C, H, W); NCHW or channels_last.
        kernel_size: the window in pixels, one number or (rows, columns); kernels take up to 254 places.
        stride: in pixels; None means `kernel_size`.
        padding: on each side in pixels, at most half of the window; padded places never win.
        dilation: distance of the window's places in pixels.
        ceil_mode: whether a last, partial window counts.
        return_indices: return torch's int64 indices into H * W too.

    Returns:
        (N, C, OH, OW) or (C, OH, OW), in the input's dtype; with `return_indices` a pair. The first of equal values
        wins; NaN propagates.

    Raises:
        TypeError: `input` is not a tensor or a size not an integer.
        RuntimeError: shapes and sizes do not go together.

    Example:
        >>> import torch, fastcnn.functional as FF
        >>> FF.max_pool2d(torch.arange(16.0).view(1, 1, 4, 4), 2)
        tensor([[[[ 5.,  7.],
                  [13., 15.]]]])
    """
    return max_pool.max_pool(input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)


def local_response_norm(input: Tensor, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0) -> Tensor:
    """Normalise each value by its neighbours in the channel axis, as ``torch.nn.functional.local_response_norm``.

    ``y = x / (k + alpha / size * sum of x**2 over size channels) ** beta`` (Krizhevsky et al., 2012, section 3.3; the
    paper's alpha is torch's alpha / size). Arithmetic is in float32.

    Args:
        input: (N, C, *), three or more axes.
        size: channels in the window, size // 2 of them before the value's own.
        alpha, beta, k: the formula's constants.

    Returns:
        The shape and dtype of `input`, under autocast too (torch turns to float32 there).

    Raises:
        TypeError: `input` is not a tensor or `size` not an integer.
        ValueError: `input` has fewer than three axes.
        RuntimeError: `size` is not positive.

    Example:
        >>> import torch, fastcnn.functional as FF
        >>> FF.local_response_norm(torch.ones(1, 4, 2, 2), size=3, alpha=3.0, beta=1.0)[0, :, 0, 0]
        tensor([0.3333, 0.2500, 0.2500, 0.3333])
    """
    return lrn.lrn(input, size, alpha, beta, k)


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
    """Normalise across channels, then max-pool: ``F.max_pool2d(F.local_response_norm(...), ...)`` in one stage.

    Args:
        input: (N, C, H, W); NCHW or channels_last.
        size, alpha, beta, k: of the normalisation, as in :func:`local_response_norm`.
        pool_size, pool_stride, pool_padding, pool_ceil_mode: of the pool, as in :func:`conv2d_relu_max_pool2d`.

    Returns:
        (N, C, OH, OW), in the input's dtype.

    Raises:
        TypeError: `input` is not a tensor or a size not an integer.
        ValueError: `input` has fewer than three axes.
        RuntimeError: shapes and sizes do not go together.

    Example:
        >>> import torch, fastcnn.functional as FF
        >>> FF.local_response_norm_max_pool2d(torch.randn(1, 8, 7, 7), 5, pool_size=3, pool_stride=2).shape
        torch.Size([1, 8, 3, 3])
    """
    return lrn_pool.lrn_pool(input, size, alpha, beta, k, pool_size, pool_stride, pool_padding, pool_ceil_mode)


def linear_relu(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Apply a linear layer and ReLU: ``F.relu(F.linear(...))`` in one stage.

    Args:
        input: (*, in_features).
        weight: (out_features, in_features), dtype and device of `input`.
        bias: (out_features,), or None.

    Returns:
        (*, out_features), in the input's dtype; under autocast in the autocast dtype.

    Raises:
        TypeError: an argument is not a tensor.
        RuntimeError: shapes, dtypes or devices do not go together.

    Example:
        >>> import torch, fastcnn.functional as FF
        >>> FF.linear_relu(torch.ones(1, 2), torch.tensor([[1.0, 2.0], [-1.0, -2.0]]))
        tensor([[3., 0.]])
    """
    return linear.linear_relu(input, weight, bias)


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
    """Normalise each channel and apply ReLU: ``F.relu(F.batch_norm(...))`` in one stage.

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

    Raises:
        TypeError: an argument is not a tensor or not a number.
        ValueError: in training, one value a channel; a negative eps, in training zero.
        RuntimeError: shapes or devices do not go together, or running statistics are missing outside training.

    Example:
        >>> import torch, fastcnn.functional as FF
        >>> FF.batch_norm_relu(torch.tensor([[1.0], [3.0]]), None, None, training=True, eps=1e-12)
        tensor([[0.],
                [1.]])
    """
    return bn_relu.bn_relu(input, running_mean, running_var, weight, bias, training, momentum, eps)


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
    """Normalise, apply ReLU and max-pool: ``F.max_pool2d(F.relu(F.batch_norm(...)), ...)`` in one stage.

    Args:
        input: (N, C, H, W); NCHW or channels_last.
        running_mean, running_var, weight, bias, training, momentum, eps: as in :func:`batch_norm_relu`.
        pool_size, pool_stride, pool_padding, pool_ceil_mode: of the pool, as in :func:`conv2d_relu_max_pool2d`.

    Returns:
        (N, C, OH, OW), in the input's dtype. The backward keeps the input and one byte a pooled value.

    Raises:
        TypeError: an argument is not a tensor or not a number.
        ValueError: as in :func:`batch_norm_relu`.
        RuntimeError: shapes, sizes or devices do not go together.

    Example:
        >>> import torch, fastcnn.functional as FF
        >>> x, mean, variance = torch.randn(2, 8, 6, 6), torch.zeros(8), torch.ones(8)
        >>> FF.batch_norm_relu_max_pool2d(x, mean, variance, pool_size=2).shape
        torch.Size([2, 8, 3, 3])
    """
    return bn_relu_pool.bn_relu_pool(
        input, running_mean, running_var, weight, bias, training, momentum, eps,
        pool_size, pool_stride, pool_padding, pool_ceil_mode,
    )  # fmt: skip


def add_relu(input: Tensor, other: Tensor) -> Tensor:
    """Add two tensors and apply ReLU, as at the end of a residual block: ``torch.relu(input + other)`` in one stage.

    Args:
        input: any shape.
        other: a shape that broadcasts with `input`'s; kernels take equal shapes and dtypes.

    Returns:
        The broadcast shape, in the dtype that ``torch.add`` promotes to.

    Raises:
        TypeError: an argument is not a tensor.
        RuntimeError: shapes or devices do not go together.

    Example:
        >>> import torch, fastcnn.functional as FF
        >>> FF.add_relu(torch.tensor([1.0, -3.0]), torch.tensor([2.0, 1.0]))
        tensor([3., 0.])
    """
    return addition.add_relu(input, other)
