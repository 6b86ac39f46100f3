"""Layers: a Sequential that runs its plain children fused, and drop-in twins of single torch layers.

The module tree stays torch's own, only the run is fused: keys, prints, slices and hooks are those of stock layers.
"""

from typing import Any, TypeAlias

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from fastcnn import functional as FF
from fastcnn import stages
from fastcnn.normalization import Normalize, is_recorded
from fastcnn.roles import GROUPS, ROLES, ROW

__all__ = ["ConvReLU2d", "ConvReLUMaxPool2d", "LocalResponseNorm", "MaxPool2d", "Normalize", "Sequential"]

# Captured at import: where a tool has replaced them, to count operations, the stock layers run and call its functions.
_MAX_POOL2D, _LRN = F.max_pool2d, F.local_response_norm

Size2d: TypeAlias = int | tuple[int, int]


class MaxPool2d(nn.MaxPool2d):
    """Max-pooling over windows of an image, as `torch.nn.MaxPool2d`, through `fastcnn.functional.max_pool2d`.

    Takes the arguments of `torch.nn.MaxPool2d`. For the backward it keeps one byte a window, the place of the largest
    value; `return_indices=True` returns torch's int64 indices.

    Shapes: input (N, C, H, W) or (C, H, W); output (N, C, OH, OW) or (C, OH, OW).

    Example:
        >>> import torch, fastcnn
        >>> fastcnn.nn.MaxPool2d(3, stride=2)(torch.randn(8, 64, 55, 55)).shape
        torch.Size([8, 64, 27, 27])
    """

    def forward(self, input: Tensor) -> Tensor:
        """Pool `input`: (N, C, H, W) or (C, H, W); with `return_indices=True` give the pair (values, indices)."""
        if is_recorded(input) or F.max_pool2d is not _MAX_POOL2D:
            return nn.MaxPool2d.forward(self, input)
        return stages.run_max_pool(input, self)


class LocalResponseNorm(nn.LocalResponseNorm):
    """Normalization over neighbouring channels, as `torch.nn.LocalResponseNorm`, in one pass over the input.

    Takes the arguments of `torch.nn.LocalResponseNorm`; see `fastcnn.functional.local_response_norm`.
    Source: Krizhevsky, Sutskever, Hinton, "ImageNet Classification with Deep Convolutional Neural Networks", 3.3.

    Shapes: input (N, C, ...), from three dimensions up; output the same.

    Example:
        >>> import torch, fastcnn
        >>> fastcnn.nn.LocalResponseNorm(5, k=2.0)(torch.randn(8, 96, 55, 55)).shape
        torch.Size([8, 96, 55, 55])
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalize `input`: (N, C, ...)."""
        if is_recorded(input) or F.local_response_norm is not _LRN:
            return nn.LocalResponseNorm.forward(self, input)
        return stages.run_lrn(input, self)


class ConvReLU2d(nn.Conv2d):
    """ReLU of a 2-D convolution in one layer; arguments and `state_dict` keys are those of `torch.nn.Conv2d`.

    Shapes: input (N, in_channels, H, W) or (in_channels, H, W); output (N, out_channels, OH, OW) or without N.

    Example:
        >>> import torch, fastcnn
        >>> fastcnn.nn.ConvReLU2d(3, 64, kernel_size=3, padding=1)(torch.randn(8, 3, 32, 32)).shape
        torch.Size([8, 64, 32, 32])
    """

    def forward(self, input: Tensor) -> Tensor:
        """Convolve `input`: (N, in_channels, H, W) or (in_channels, H, W), and take the ReLU."""
        return _conv_relu(self, input) if is_recorded(input) else stages.run_conv_relu(input, self)


class ConvReLUMaxPool2d(nn.Conv2d):
    """Max-pool of the ReLU of a 2-D convolution in one layer; `state_dict` keys are those of `torch.nn.Conv2d`.

    Takes the arguments of `torch.nn.Conv2d`, then by keyword `pool_size`, `pool_stride` (default: `pool_size`),
    `pool_padding` and `pool_ceil_mode`, which are `torch.nn.MaxPool2d`'s; sizes are in pixels.

    Shapes: input (N, in_channels, H, W) or (in_channels, H, W); output (N, out_channels, PH, PW) or without N.

    Example:
        >>> import torch, fastcnn
        >>> layer = fastcnn.nn.ConvReLUMaxPool2d(3, 64, 11, stride=4, padding=2, pool_size=3, pool_stride=2)
        >>> layer(torch.randn(8, 3, 224, 224)).shape
        torch.Size([8, 64, 27, 27])
    """

    def __init__(
        self,
        *args: Any,
        pool_size: Size2d,
        pool_stride: Size2d | None = None,
        pool_padding: Size2d = 0,
        pool_ceil_mode: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.pool_size = pool_size
        self.pool_stride = pool_size if pool_stride is None else pool_stride
        self.pool_padding = pool_padding
        self.pool_ceil_mode = pool_ceil_mode

    def forward(self, input: Tensor) -> Tensor:
        """Convolve `input`: (N, in_channels, H, W) or (in_channels, H, W), take the ReLU, and pool."""
        if is_recorded(input):
            return _conv_relu_pool(self, input)
        return FF.conv2d_relu_max_pool2d(
            *stages.conv_arguments(input, self),
            pool_size=self.pool_size,
            pool_stride=self.pool_stride,
            pool_padding=self.pool_padding,
            pool_ceil_mode=self.pool_ceil_mode,
        )

    def extra_repr(self) -> str:
        """Give the convolution's settings, then the pool's."""
        return (
            f"{super().extra_repr()}, pool_size={self.pool_size}, pool_stride={self.pool_stride}, "
            f"pool_padding={self.pool_padding}, pool_ceil_mode={self.pool_ceil_mode}"
        )


class Sequential(nn.Sequential):
    """Run children one after another as `torch.nn.Sequential` does, with neighbouring plain layers fused.

    The children stay ordinary layers (`nn.Conv2d`, `nn.ReLU`, ...), found by index, name, hook and key as in
    `torch.nn.Sequential`. On each call the longest runs of children that form a stage run as one function:
    (Normalize-)Conv2d-ReLU(-MaxPool2d), Conv2d(-BatchNorm2d)-ReLU(-MaxPool2d), BatchNorm2d-ReLU(-MaxPool2d),
    LocalResponseNorm(-MaxPool2d), MaxPool2d, Linear-ReLU(-Dropout). In evaluation a batch norm may be folded into the
    convolution before it. A child with a hook, a forward of its own or a compiled call runs by itself. While
    torch.export, torch.fx or torch.jit.trace records a graph, every child runs by itself.

    Shapes: those of the children.

    Example:
        >>> import torch, fastcnn
        >>> from torch import nn
        >>> features = fastcnn.nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
        >>> features(torch.randn(8, 3, 32, 32)).shape
        torch.Size([8, 64, 16, 16])
        >>> features[:1]  # the convolution alone: values before the ReLU
        Sequential(
          (0): Conv2d(3, 64, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))
        )
    """

    def forward(self, input: Any) -> Any:
        """Run the children on `input`, which is whatever the first child takes."""
        if is_recorded(input) or _has_any_global_hook():
            return nn.Sequential.forward(self, input)
        layers = tuple(self._modules.values())
        return stages.run_stages(input, layers, layers)

    def __add__(self, other: nn.Sequential) -> "Sequential":
        """Join two Sequentials; `torch.nn.Sequential` would give one that runs unfused."""
        return type(self)(*super().__add__(other))

    def __mul__(self, other: int) -> "Sequential":
        """Repeat the children `other` times; `torch.nn.Sequential` would give one that runs unfused."""
        return type(self)(*super().__mul__(other))


def _conv_relu(self: nn.Conv2d, input: Tensor) -> Tensor:
    return F.relu(self._conv_forward(input, self.weight, self.bias))


def _conv_relu_pool(self: ConvReLUMaxPool2d, input: Tensor) -> Tensor:
    activations = F.relu(self._conv_forward(input, self.weight, self.bias))
    return F.max_pool2d(activations, self.pool_size, self.pool_stride, self.pool_padding, ceil_mode=self.pool_ceil_mode)


# torch.jit.script compiles the source of the function in `__wrapped__`.
for _layer, _stock in (
    (Sequential, nn.Sequential.forward),
    (MaxPool2d, nn.MaxPool2d.forward),
    (LocalResponseNorm, nn.LocalResponseNorm.forward),
    (ConvReLU2d, _conv_relu),
    (ConvReLUMaxPool2d, _conv_relu_pool),
):
    _layer.forward.__wrapped__ = _stock  # type: ignore[union-attr]

ROLES.update({MaxPool2d.forward: "pool", LocalResponseNorm.forward: "lrn"})
GROUPS[Sequential.forward] = ROW
