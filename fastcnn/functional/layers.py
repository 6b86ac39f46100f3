"""Convolutions, pools, linear layers and sums, each with the layers that follow it."""

from typing import Any

from torch import Tensor
from torch.compiler import is_compiling

from fastcnn.ops.add_relu import OP as ADD_RELU
from fastcnn.ops.conv_relu import OP as CONV_RELU
from fastcnn.ops.conv_relu_pool import OP as CONV_RELU_POOL
from fastcnn.ops.linear_relu import OP as LINEAR_RELU
from fastcnn.ops.linear_relu_dropout import OP as LINEAR_RELU_DROPOUT
from fastcnn.ops.max_pool import OP as MAX_POOL
from fastcnn.shapes import Size


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

    Raises TypeError for arguments of another type, RuntimeError for shapes, dtypes or devices that do not go together.

    Example:
        >>> import torch, fastcnn.functional as FF
        >>> FF.conv2d_relu(torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3), torch.randn(4), padding=1).shape
        torch.Size([2, 4, 8, 8])
    """
    run = CONV_RELU.python if is_compiling() else CONV_RELU.planned
    return run(input, weight, bias, stride, padding, dilation, groups)


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

    For the backward one byte a pooled value is kept instead of the convolution's output.

    Args:
        input, weight, bias, stride, padding, dilation, groups: of the convolution, as in :func:`conv2d_relu`.
        pool_size: the pooling window in pixels, one number or (rows, columns).
        pool_stride: in pixels; None means `pool_size`.
        pool_padding: on each side in pixels, at most half of the window.
        pool_ceil_mode: whether a last, partial window counts.

    Returns:
        (N, C_out, OH, OW) or (C_out, OH, OW), in the input's dtype; under autocast in the autocast dtype.

    Raises TypeError for arguments of another type, RuntimeError for shapes, dtypes or devices that do not go together.

    Example:
        >>> import torch, fastcnn.functional as FF
        >>> x, weight = torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3)
        >>> FF.conv2d_relu_max_pool2d(x, weight, padding=1, pool_size=2).shape
        torch.Size([2, 4, 4, 4])
    """
    run = CONV_RELU_POOL.python if is_compiling() else CONV_RELU_POOL.planned
    return run(
        input, weight, bias, stride, padding, dilation, groups, pool_size, pool_stride, pool_padding, pool_ceil_mode
    )


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

    Raises TypeError for arguments of another type, RuntimeError for shapes and sizes that do not go together.

    Example:
        >>> import torch, fastcnn.functional as FF
        >>> FF.max_pool2d(torch.arange(16.0).view(1, 1, 4, 4), 2)
        tensor([[[[ 5.,  7.],
                  [13., 15.]]]])
    """
    run = MAX_POOL.python if is_compiling() else MAX_POOL.planned
    return run(input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)


def linear_relu(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Apply a linear layer and ReLU: ``F.relu(F.linear(...))`` in one stage.

    Args:
        input: (*, in_features).
        weight: (out_features, in_features), dtype and device of `input`.
        bias: (out_features,), or None.

    Returns:
        (*, out_features), in the input's dtype; under autocast in the autocast dtype.

    Raises TypeError for arguments of another type, RuntimeError for shapes, dtypes or devices that do not go together.

    Example:
        >>> import torch, fastcnn.functional as FF
        >>> FF.linear_relu(torch.ones(1, 2), torch.tensor([[1.0, 2.0], [-1.0, -2.0]]))
        tensor([[3., 0.]])
    """
    run = LINEAR_RELU.python if is_compiling() else LINEAR_RELU.planned
    return run(input, weight, bias)


def linear_relu_dropout(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, p: float = 0.5, training: bool = True
) -> Tensor:
    """Apply a linear layer, ReLU and dropout: ``F.dropout(F.relu(F.linear(...)), p, training)`` in one stage.

    Backend ``triton`` draws the dropout mask from a seed of torch's generator: it obeys ``torch.manual_seed``, but is
    another mask than stock's. It is not kept, as the backward finds it in the zeros of the output. The other backends
    use torch's dropout, with the same mask as stock.

    Args:
        input, weight, bias: as in :func:`linear_relu`.
        p: the probability that a unit is dropped, 0 to 1; the other units are divided by 1 - p.
        training: whether dropout is applied.

    Returns:
        (*, out_features), in the input's dtype; under autocast in the autocast dtype.

    Raises what :func:`linear_relu` raises, and for `p` TypeError unless it is a number, ValueError if not from 0 to 1.

    Example:
        >>> import torch, fastcnn.functional as FF
        >>> FF.linear_relu_dropout(torch.ones(1, 2), torch.tensor([[1.0, 2.0], [-1.0, -2.0]]), training=False)
        tensor([[3., 0.]])
    """
    run = LINEAR_RELU_DROPOUT.python if is_compiling() else LINEAR_RELU_DROPOUT.planned
    return run(input, weight, bias, p, training)


def add_relu(input: Tensor, other: Tensor) -> Tensor:
    """Add two tensors and apply ReLU, as at the end of a residual block: ``torch.relu(input + other)`` in one stage.

    Args:
        input: any shape.
        other: a shape that broadcasts with `input`'s; kernels take equal shapes and dtypes.

    Returns:
        The broadcast shape, in the dtype that ``torch.add`` promotes to.

    Raises TypeError for arguments of another type, RuntimeError for shapes or devices that do not go together.

    Example:
        >>> import torch, fastcnn.functional as FF
        >>> FF.add_relu(torch.tensor([1.0, -3.0]), torch.tensor([2.0, 1.0]))
        tensor([3., 0.])
    """
    run = ADD_RELU.python if is_compiling() else ADD_RELU.planned
    return run(input, other)
