"""Calls of torch's functions as layers: ``F.max_pool2d(x, 2)`` in a forward is treated like ``nn.MaxPool2d(2)``."""

import operator
from collections import namedtuple
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

# What each function takes besides its input, named as the attributes of the layer in the same role.
ReLU = namedtuple("ReLU", "inplace", defaults=[False])
MaxPool2d = namedtuple(
    "MaxPool2d", "kernel_size stride padding dilation ceil_mode return_indices", defaults=[None, 0, 1, False, False]
)
LocalResponseNorm = namedtuple("LocalResponseNorm", "size alpha beta k", defaults=[1e-4, 0.75, 1.0])
BatchNorm = namedtuple(
    "BatchNorm", "running_mean running_var weight bias training momentum eps", defaults=[None, None, False, 0.1, 1e-5]
)
Dropout = namedtuple("Dropout", "p training inplace", defaults=[0.5, True, False])
Add = namedtuple("Add", "other in_place")  # in place it needs `other` to be of the input's shape and dtype

# The role of a function, or of a tensor's method by its name, in a stage, and its settings.
FUNCTIONS: dict[Any, tuple[str, Callable[..., Any]]] = {
    F.relu: ("relu", ReLU),
    F.relu_: ("relu", ReLU),
    torch.relu: ("relu", ReLU),
    torch.relu_: ("relu", ReLU),
    F.max_pool2d: ("pool", MaxPool2d),
    F.local_response_norm: ("lrn", LocalResponseNorm),
    F.batch_norm: ("batch_norm", BatchNorm),
    F.dropout: ("dropout", Dropout),
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
    """Return the call ``function(input, *args, **kwargs)`` without its input; a name stands for the input's method."""
    return Call(function, FUNCTIONS.get(function), args, kwargs)


def add(other: Any) -> Call:
    """Return the call ``input + other`` without its input."""
    return Call(operator.add, ("add", partial(Add, in_place=False)), (other,), {})


def add_to(is_new: bool, other: Any) -> Call:
    """Return the call ``input += other`` without its input; if that `is_new`, no other code can see it change."""
    return Call(operator.iadd, ("add", partial(Add, in_place=True)) if is_new else None, (other,), {})
