"""Calls of torch's functions as layers: ``F.max_pool2d(x, 2)`` in a forward is treated like ``nn.MaxPool2d(2)``."""

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F


class ReLU(NamedTuple):
    """What ``F.relu`` takes besides its input."""

    inplace: bool = False


class MaxPool2d(NamedTuple):
    """What ``F.max_pool2d`` takes besides its input."""

    kernel_size: Any
    stride: Any = None
    padding: Any = 0
    dilation: Any = 1
    ceil_mode: bool = False
    return_indices: bool = False


class LocalResponseNorm(NamedTuple):
    """What ``F.local_response_norm`` takes besides its input."""

    size: int
    alpha: float = 1e-4
    beta: float = 0.75
    k: float = 1.0


class BatchNorm(NamedTuple):
    """What ``F.batch_norm`` takes besides its input."""

    running_mean: Any
    running_var: Any
    weight: Any = None
    bias: Any = None
    training: bool = False
    momentum: float = 0.1
    eps: float = 1e-5


class Dropout(NamedTuple):
    """What ``F.dropout`` takes besides its input."""

    p: float = 0.5
    training: bool = True
    inplace: bool = False


class Add(NamedTuple):
    """What a sum takes besides its input; in place it needs `other` to be of the input's shape and dtype."""

    other: Any
    in_place: bool


# The role of a function in a stage, and its settings, named as the attributes of the layer in the same role.
FUNCTIONS: dict[Any, tuple[str, Callable[..., Any]]] = {
    F.relu: ("relu", ReLU),
    F.relu_: ("relu", ReLU),
    torch.relu: ("relu", ReLU),
    torch.relu_: ("relu", ReLU),
    F.max_pool2d: ("pool", MaxPool2d),
    F.local_response_norm: ("lrn", LocalResponseNorm),
    F.batch_norm: ("batch_norm", BatchNorm),
    F.dropout: ("dropout", Dropout),
}
METHODS: dict[str, tuple[str, Callable[..., Any]]] = {
    "relu": ("relu", ReLU),
    "relu_": ("relu", ReLU),
}


def _pool_role(pool: Any) -> str:
    return "pool" if pool.dilation in (1, (1, 1)) and not pool.return_indices else "lone pool"


def _dropout_role(dropout: Any) -> str | None:  # in place, torch drops by other random numbers
    return None if dropout.inplace else "dropout"


# What a call, or a layer, of a role becomes by its settings.
ADMITTED: dict[str, Callable[[Any], str | None]] = {"pool": _pool_role, "dropout": _dropout_role}


class Call:
    """A call without its input; `role` is None if the function is not torch's own, or has been replaced since."""

    __slots__ = ("args", "function", "kwargs", "role", "settings")

    def __init__(self, function: Any, known: tuple[str, Callable[..., Any]] | None, args: Any, kwargs: Any) -> None:
        self.function, self.args, self.kwargs = function, args, kwargs
        self.role: str | None = None
        self.settings: Any = None
        if known is None:
            return
        role, settings = known
        try:
            self.settings = settings(*args, **kwargs)
        except TypeError:  # the call itself will say what is wrong with its arguments
            return
        self.role = ADMITTED[role](self.settings) if role in ADMITTED else role

    def __call__(self, input: Any) -> Any:
        """Call the function, or the method of the input."""
        if type(self.function) is str:
            return getattr(input, self.function)(*self.args, **self.kwargs)
        return self.function(input, *self.args, **self.kwargs)


def call(function: Any, *args: Any, **kwargs: Any) -> Call:
    """Return the call ``function(input, *args, **kwargs)`` without its input."""
    return Call(function, FUNCTIONS.get(function), args, kwargs)


def method(name: str, *args: Any, **kwargs: Any) -> Call:
    """Return the call ``input.name(*args, **kwargs)`` without its input."""
    return Call(name, METHODS.get(name), args, kwargs)


def add(other: Any) -> Call:
    """Return the call ``input + other`` without its input."""
    return _sum(operator.add, other, True)


def add_to(is_new: bool, other: Any) -> Call:
    """Return the call ``input += other`` without its input; if that `is_new`, no other code can see it change."""
    return _sum(operator.iadd, other, is_new)


def _sum(function: Any, other: Any, is_known: bool) -> Call:
    known = ("add", lambda other: Add(other, function is operator.iadd)) if is_known else None
    return Call(function, known, (other,), {})
