"""Layers: a Sequential that runs its plain children fused, and drop-in twins of single torch layers.

The module tree stays torch's own, only the run is fused: keys, prints, slices and hooks are those of stock layers.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from fastcnn import functional as FF
from fastcnn.calls import Call
from fastcnn.functional import only_reader
from fastcnn.ops.folding import folded, folds

__all__ = ["ConvReLU2d", "ConvReLUMaxPool2d", "LocalResponseNorm", "MaxPool2d", "Sequential"]

Size2d: TypeAlias = int | tuple[int, int]

# Captured at import, so that a class whose forward somebody patches later no longer counts as stock.
_STOCK_CALL = nn.Module.__call__
_STOCK_CONV_FORWARD = nn.Conv2d._conv_forward
_STOCK_BN_CHECK = nn.BatchNorm2d._check_input_dim


def _is_recorded(input: Any) -> bool:
    """Whether a graph of the layers is being written down, which shall hold torch's operators and need no fastcnn."""
    tracing: bool = torch.jit.is_tracing()  # type: ignore[attr-defined]
    # The flag, as torch.compiler.is_exporting() is true under any torch.compile of torch 2.11.
    return tracing or torch.compiler._is_exporting_flag or isinstance(input, torch.fx.Proxy)


class MaxPool2d(nn.MaxPool2d):
    """Max-pooling over windows of an image, as `torch.nn.MaxPool2d`, through `fastcnn.functional.max_pool2d`.

    Takes the arguments of `torch.nn.MaxPool2d`. Where autograd needs a memory of the winners it is one byte a window;
    `return_indices=True` gives torch's int64 indices.

    Shapes: input (N, C, H, W) or (C, H, W); output (N, C, OH, OW) or (C, OH, OW).

    Example:
        >>> import torch, fastcnn
        >>> fastcnn.nn.MaxPool2d(3, stride=2)(torch.randn(8, 64, 55, 55)).shape
        torch.Size([8, 64, 27, 27])
    """

    def forward(self, input: Tensor) -> Tensor:
        """Pool `input`: (N, C, H, W) or (C, H, W); with `return_indices=True` give the pair (values, indices)."""
        return super().forward(input) if _is_recorded(input) else _max_pool(input, self)


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
        return super().forward(input) if _is_recorded(input) else _lrn(input, self)


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
        return F.relu(super().forward(input)) if _is_recorded(input) else _conv_relu(input, self)


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
        if _is_recorded(input):
            activations = F.relu(super().forward(input))
            return F.max_pool2d(
                activations, self.pool_size, self.pool_stride, self.pool_padding, ceil_mode=self.pool_ceil_mode
            )
        return FF.conv2d_relu_max_pool2d(
            *_conv_arguments(input, self),
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
    Conv2d(-BatchNorm2d)-ReLU(-MaxPool2d), BatchNorm2d-ReLU(-MaxPool2d), LocalResponseNorm(-MaxPool2d), MaxPool2d,
    Linear-ReLU; a batch norm whose statistics stand still may go into the convolution before it. A child that has a
    hook, a forward of its own or a compiled call runs by itself. So does every child while torch.export, torch.fx or
    torch.jit.trace records a graph.

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
        if _is_recorded(input) or _has_any_global_hook():
            return super().forward(input)
        return _run_stages(input, tuple(self))

    def __add__(self, other: nn.Sequential) -> "Sequential":
        """Join two Sequentials; `torch.nn.Sequential` would give one that runs unfused."""
        return type(self)(*super().__add__(other))

    def __mul__(self, other: int) -> "Sequential":
        """Repeat the children `other` times; `torch.nn.Sequential` would give one that runs unfused."""
        return type(self)(*super().__mul__(other))


def _conv_arguments(input: Any, conv: nn.Conv2d) -> tuple[Any, ...]:
    padding: Any = conv.padding
    if conv.padding_mode != "zeros":  # nn.Conv2d pads in a step of its own too
        input, padding = F.pad(input, conv._reversed_padding_repeated_twice, mode=conv.padding_mode), 0
    return input, conv.weight, conv.bias, conv.stride, padding, conv.dilation, conv.groups


def _pool_keywords(pool: nn.MaxPool2d) -> dict[str, Any]:
    return {
        "pool_size": pool.kernel_size,
        "pool_stride": pool.stride,
        "pool_padding": pool.padding,
        "pool_ceil_mode": pool.ceil_mode,
    }


def _conv_relu(input: Any, conv: nn.Conv2d, _relu: nn.Module | None = None) -> Any:
    return FF.conv2d_relu(*_conv_arguments(input, conv))


def _conv_relu_pool(input: Any, conv: nn.Conv2d, _relu: nn.Module, pool: nn.MaxPool2d) -> Any:
    return FF.conv2d_relu_max_pool2d(*_conv_arguments(input, conv), **_pool_keywords(pool))


def _bn_arguments(bn: nn.BatchNorm2d) -> tuple[Any, ...]:
    """Return what the layer's own forward gives F.batch_norm after the input, and count the batch as it does."""
    tracks = bn.training and bn.track_running_stats
    momentum = 0.0 if bn.momentum is None else bn.momentum
    if tracks and bn.num_batches_tracked is not None:
        bn.num_batches_tracked.add_(1)
        if bn.momentum is None:  # the average over all batches
            momentum = 1.0 / float(bn.num_batches_tracked)
    running = (bn.running_mean, bn.running_var) if tracks or not bn.training else (None, None)
    return *running, bn.weight, bn.bias, _uses_own_statistics(bn), momentum, bn.eps


def _uses_own_statistics(bn: nn.BatchNorm2d) -> bool:
    return bn.training or (bn.running_mean is None and bn.running_var is None)


def _bn_relu(input: Any, bn: nn.BatchNorm2d, _relu: nn.Module | None = None) -> Any:
    bn._check_input_dim(input)
    return FF.batch_norm_relu(input, *_bn_arguments(bn))


def _bn_relu_pool(input: Any, bn: nn.BatchNorm2d, _relu: nn.Module, pool: nn.MaxPool2d) -> Any:
    bn._check_input_dim(input)
    return FF.batch_norm_relu_max_pool2d(input, *_bn_arguments(bn), **_pool_keywords(pool))


def _folds(input: Any, conv: nn.Conv2d, bn: nn.BatchNorm2d) -> bool:
    """Whether the batch norm is constant and the convolution takes it up."""
    if _uses_own_statistics(bn) or not isinstance(input, Tensor) or input.dim() != 4:
        return False
    return folds(input, conv.stride, conv.weight, conv.bias, bn.weight, bn.bias)


def _folded_arguments(input: Any, conv: nn.Conv2d, bn: nn.BatchNorm2d) -> tuple[Any, ...]:
    input, weight, bias, *settings = _conv_arguments(input, conv)
    return input, *folded(weight, bias, bn.running_mean, bn.running_var, bn.weight, bn.bias, bn.eps), *settings


def _conv_bn(input: Any, conv: nn.Conv2d, bn: nn.BatchNorm2d) -> Any:
    if _folds(input, conv, bn):
        return F.conv2d(*_folded_arguments(input, conv, bn))
    return bn(F.conv2d(*_conv_arguments(input, conv)))


def _conv_bn_relu(input: Any, conv: nn.Conv2d, bn: nn.BatchNorm2d, relu: nn.Module | None = None) -> Any:
    if _folds(input, conv, bn):
        return FF.conv2d_relu(*_folded_arguments(input, conv, bn))
    return _bn_relu(F.conv2d(*_conv_arguments(input, conv)), bn, relu)


def _conv_bn_relu_pool(input: Any, conv: nn.Conv2d, bn: nn.BatchNorm2d, relu: nn.Module, pool: nn.MaxPool2d) -> Any:
    if _folds(input, conv, bn):
        return FF.conv2d_relu_max_pool2d(*_folded_arguments(input, conv, bn), **_pool_keywords(pool))
    return _bn_relu_pool(F.conv2d(*_conv_arguments(input, conv)), bn, relu, pool)


def _add_relu(input: Any, other: Any) -> Any:
    return F.relu(input + other) if _is_recorded(input) else FF.add_relu(input, other)


def _lrn(input: Any, lrn: nn.LocalResponseNorm) -> Any:
    return FF.local_response_norm(input, lrn.size, lrn.alpha, lrn.beta, lrn.k)


def _lrn_pool(input: Any, lrn: nn.LocalResponseNorm, pool: nn.MaxPool2d) -> Any:
    return FF.local_response_norm_max_pool2d(input, lrn.size, lrn.alpha, lrn.beta, lrn.k, **_pool_keywords(pool))


def _max_pool(input: Any, pool: nn.MaxPool2d) -> Any:
    return FF.max_pool2d(
        input,
        pool.kernel_size,
        pool.stride,
        pool.padding,
        pool.dilation,
        ceil_mode=pool.ceil_mode,
        return_indices=pool.return_indices,
    )


def _linear_relu(input: Any, linear: nn.Linear, _relu: nn.Module) -> Any:
    return FF.linear_relu(input, linear.weight, linear.bias)


class _Stage(NamedTuple):
    """Children in a row, by role, and the function that runs them as one."""

    roles: tuple[str, ...]
    run: Callable[..., Any]


_CONV_RELU = _Stage(("conv", "relu"), _conv_relu)
_STAGES = (  # of two that match, the longer stands first
    _Stage(("conv", "bn", "relu", "pool"), _conv_bn_relu_pool),
    _Stage(("conv", "bn", "relu"), _conv_bn_relu),
    _Stage(("conv", "bn"), _conv_bn),
    _Stage(("bn", "relu", "pool"), _bn_relu_pool),
    _Stage(("bn", "relu"), _bn_relu),
    _Stage(("conv", "relu", "pool"), _conv_relu_pool),
    _CONV_RELU,
    _Stage(("lrn", "pool"), _lrn_pool),
    _Stage(("lrn",), _lrn),
    _Stage(("pool",), _max_pool),
    _Stage(("lone pool",), _max_pool),
    _Stage(("linear", "relu"), _linear_relu),
)

_ROLES: dict[Any, str] = {  # by the forward function of the class
    nn.Conv2d.forward: "conv",
    nn.ReLU.forward: "relu",
    nn.MaxPool2d.forward: "pool",
    MaxPool2d.forward: "pool",
    nn.LocalResponseNorm.forward: "lrn",
    LocalResponseNorm.forward: "lrn",
    nn.Linear.forward: "linear",
    nn.BatchNorm2d.forward: "bn",
}


def _run_layers(input: Any, *layers: Any) -> Any:
    """Run layers and calls of functions one after another, as the rewritten forward of a network asks for."""
    if not (_is_recorded(input) or _has_any_global_hook()):
        return _run_stages(input, layers)
    for layer in layers:
        input = layer(input)
    return input


def _run_stages(input: Any, layers: tuple[Any, ...]) -> Any:
    """Run layers one after another, those that form a stage as one."""
    roles = tuple(map(_role, layers))
    start, before = 0, None
    while start < len(layers):
        stage = _stage_at(roles, start)
        if stage is None:
            input = layers[start](input)
            start += 1
        else:
            if before is _CONV_RELU and stage.roles[0] == "conv":
                only_reader(input)
            end = start + len(stage.roles)
            input = stage.run(input, *map(_settings, layers[start:end]))
            start = end
        before = stage
    return input


def _settings(layer: Any) -> Any:
    return layer.settings if type(layer) is Call else layer


def _stage_at(roles: tuple[str | None, ...], start: int) -> _Stage | None:
    for stage in _STAGES:
        if roles[start : start + len(stage.roles)] == stage.roles:
            return stage
    return None


def _role(child: Any) -> str | None:
    """Tell what `child` can be in a stage, or None where only its own call does all that the user asked of it."""
    if type(child) is Call:
        return child.role
    # Looked up on the class, as torch.compile traces that; subclasses that keep the stock forward keep the role, and
    # a scripted module's class has no forward to read.
    role = _ROLES.get(getattr(type(child), "forward", None))
    if role is None or not _calls_only_forward(child):
        return None
    if isinstance(child, nn.Conv2d):
        return role if type(child)._conv_forward is _STOCK_CONV_FORWARD else None
    if role == "bn":  # one forward serves batch norms of every rank
        return role if getattr(type(child), "_check_input_dim", None) is _STOCK_BN_CHECK else None
    if isinstance(child, nn.MaxPool2d):
        return role if _can_end_a_stage(child) else "lone pool"
    return role


def _calls_only_forward(child: nn.Module) -> bool:
    # Read from the dictionary: torch.compile guards what is read there, so that a hook added after compiling fires;
    # by its default settings it does not guard the same hooks read as attributes.
    state = child.__dict__
    return type(child).__call__ is _STOCK_CALL and not (
        "forward" in state
        or state.get("_compiled_call_impl")
        or state["_forward_pre_hooks"]
        or state["_forward_hooks"]
        or state["_backward_pre_hooks"]
        or state["_backward_hooks"]
    )


def _can_end_a_stage(pool: Any) -> bool:
    return pool.dilation in (1, (1, 1)) and not pool.return_indices
