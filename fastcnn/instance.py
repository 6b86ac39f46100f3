"""Methods that are set on one module, whose class stays what it is."""

import copy
import functools
import inspect
import logging
import weakref
from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any

from torch import nn

logger = logging.getLogger("fastcnn")


class InstanceMethod:
    """A function bound to one module under one name.

    It holds the module by a weak reference, so that memory is freed at once, as for a stock module. A copy of the
    module gets a method of its own.
    """

    def __init__(self, function: Callable[..., Any], module: Any, name: str) -> None:
        self.function, self.module, self.name = function, weakref.ref(module), name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function with the module as its first argument."""
        return self.function(self.module(), *args, **kwargs)

    def _method(self) -> MethodType:
        module = self.module()
        if module is None:
            raise ReferenceError(f"{self.name}: the module of this method is gone")
        return MethodType(self.function, module)

    def __getattr__(self, name: str) -> Any:
        """Read what a bound method has: torch.export looks at its `__code__`, others at its `__name__`."""
        return getattr(self._method(), name)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._method())

    def __deepcopy__(self, memo: dict[int, Any]) -> "InstanceMethod":
        return type(self)(self.function, copy.deepcopy(self.module(), memo), self.name)

    def __reduce__(self) -> tuple[Any, ...]:
        """Save a method that is pickled apart from its module as the method of the module's class."""
        return getattr, (self.module(), self.name)


class _State(dict[str, Any]):
    """A module's attributes: copied with its instance methods, saved without, and so loaded without fastcnn."""

    def __init__(self, state: Mapping[str, Any]) -> None:
        self.methods = _own(state)
        super().__init__((name, value) for name, value in state.items() if name not in self.methods)

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, Any]:
        return copy.deepcopy({**self, **self.methods}, memo)

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)


def _own(state: Mapping[str, Any]) -> dict[str, InstanceMethod]:
    """Return those of a module's attributes that `set_methods` has set, and no other code has moved."""
    return {name: value for name, value in state.items() if type(value) is InstanceMethod and value.name == name}


def _state(self: nn.Module) -> Any:
    state = type(self).__getstate__(self)
    return _State(state) if isinstance(state, dict) else state


def _replica(self: nn.Module) -> nn.Module:
    """Bind the methods of a replica, which starts with the attributes of the module, to the replica."""
    replica = type(self)._replicate_for_data_parallel(self)
    for name, method in _own(vars(self)).items():
        vars(replica)[name] = InstanceMethod(method.function, replica, name)
    return replica


def set_methods(module: nn.Module, methods: Mapping[str, Callable[..., Any]]) -> None:
    """Set methods on one module, and with them the methods by which it is copied, saved, replicated and scripted.

    A method that other code has set on the module stays.
    """
    around = {
        "__getstate__": _state,
        "_replicate_for_data_parallel": _replica,
        "__prepare_scriptable__": _without_methods,
    }
    for name, function in {**methods, **around}.items():
        if not is_replaced(module, name):
            vars(module)[name] = InstanceMethod(function, module, name)


def has_methods(module: nn.Module) -> bool:
    """Whether a module has a method that `set_methods` has set and no other code has replaced."""
    return bool(_own(vars(module)))


def remove_methods(module: nn.Module) -> None:
    """Remove the methods that `set_methods` has set and no other code has replaced."""
    for name in _own(vars(module)):
        del vars(module)[name]


def _without_methods(self: nn.Module) -> nn.Module:
    """Give torch.jit.script this module without its methods: it is stock from then on."""
    _say_scripted()
    remove_methods(self)
    return self


@functools.cache
def _say_scripted() -> None:
    logger.warning(
        "torch.jit.script undoes fuse on what it scripts: call fastcnn.fuse again to run these modules fused in Python"
    )


def is_replaced(module: nn.Module, name: str) -> bool:
    """Whether other code has set a method on a module, other than the method of the module's class."""
    value = vars(module).get(name)
    if value is None or type(value) is InstanceMethod:
        return False
    own = type(value) is MethodType and value.__self__ is module
    return not (own and value.__func__ is getattr(type(module), name, None))
