"""What the modules of a network refer to besides their children, and copies of modules that refer to one another."""

import gc
import logging
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import partial
from types import FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.module import _WrappedHook
from torch.utils.hooks import RemovableHandle


class References(NamedTuple):
    """The modules of a network, and the lists, methods, hooks and so on through which they refer to one another."""

    values: dict[int, Any]  # by id
    users: dict[int, list[int]]  # what refers to each of them
    fixed: dict[int, str]  # modules that must stay the very objects they are, and why


class _Kind(NamedTuple):
    """How to take a value apart and make it of other parts; with `fill`, it is made empty, as it may be in a cycle."""

    parts: Callable[[Any], list[Any]]
    make: Callable[[list[Any]], Any]
    fill: Callable[[Any, list[Any]], None] | None = None


def _fill_dict(made: dict[Any, Any], parts: list[Any]) -> None:
    made.update(zip(parts[: len(parts) // 2], parts[len(parts) // 2 :], strict=True))


def _by_attributes(kind: type) -> _Kind:
    def fill(made: Any, parts: list[Any]) -> None:
        object.__setattr__(made, "__dict__", *parts)

    return _Kind(lambda value: [vars(value)], lambda _: object.__new__(kind), fill)


_KINDS: dict[type, _Kind] = {
    list: _Kind(list, lambda _: [], list.extend),
    set: _Kind(list, lambda _: set(), set.update),
    dict: _Kind(lambda value: [*value, *value.values()], lambda _: {}, _fill_dict),
    OrderedDict: _Kind(lambda value: [*value, *value.values()], lambda _: OrderedDict(), _fill_dict),
    tuple: _Kind(list, tuple),
    MethodType: _Kind(lambda value: [value.__func__, value.__self__], lambda parts: MethodType(*parts)),
    partial: _Kind(
        lambda value: [value.func, value.args, value.keywords, vars(value)],
        lambda _: partial(print),
        lambda made, parts: made.__setstate__(tuple(parts)),
    ),
    weakref.ReferenceType: _Kind(lambda value: [value()], lambda parts: weakref.ref(*parts)),
    _WrappedHook: _by_attributes(_WrappedHook),
    RemovableHandle: _by_attributes(RemovableHandle),
}


def references(model: nn.Module) -> References:
    """Follow what the modules of a model refer to.

    Where that goes through something that cannot be copied, such as a closure, an object of the user's or a module that
    is no part of the model, the modules behind it are fixed: it will always see these.
    """
    tree = {id(each) for each in model.modules() if not isinstance(each, torch.jit.ScriptModule)}
    found = References({}, {}, {})
    waiting: list[Any] = [model]
    unknown: list[Any] = []
    while waiting:
        value = waiting.pop()
        if id(value) in found.values:
            continue
        kind = _kind(value, tree)
        if kind is None:
            unknown.append(value)
            continue
        found.values[id(value)] = value
        for part in filter(gc.is_tracked, kind.parts(value)):  # what is not tracked refers to nothing
            found.users.setdefault(id(part), []).append(id(value))
            waiting.append(part)
    seen: set[int] = set()
    for value in unknown:
        for module in _modules_behind(value, seen):
            found.fixed.setdefault(id(module), f"{_name(value)} refers to it, and cannot be copied with it")
    return found


def copies(found: References, classes: dict[int, type[nn.Module]]) -> dict[int, Any]:
    """Copy, shallowly, the modules that shall be of other classes, and all that refers to them; return it by id.

    The copies refer to one another as the originals do. Parameters, buffers and all else is the same in both.
    """
    kinds: dict[int, _Kind] = {}
    waiting = list(classes)
    while waiting:
        each = waiting.pop()
        if each in kinds:
            continue
        value = found.values[each]
        if isinstance(value, nn.Module):
            if _is_compiled(value):
                raise TypeError(f"model: expected layers not compiled yet, got a compiled {type(value).__name__}")
            kinds[each] = _by_attributes(classes.get(each, type(value)))
            waiting.append(id(vars(value)))
        else:
            kinds[each] = _KINDS[type(value)]
        waiting += found.users.get(each, ())
    made = {each: kind.make([]) for each, kind in kinds.items() if kind.fill}  # no __init__: it makes new parameters

    def copied(value: Any) -> Any:
        key = id(value)
        if key not in made and key in kinds:
            made[key] = kinds[key].make([copied(part) for part in kinds[key].parts(value)])
        return made.get(key, value)

    for each, kind in kinds.items():
        if kind.fill:
            kind.fill(made[each], [copied(part) for part in kind.parts(found.values[each])])
    for each in made.values():
        if isinstance(each, nn.Module):
            each._modules = dict(each._modules)  # a child set later is set in one of the two
    return made


def _is_compiled(module: nn.Module) -> bool:
    """Whether a module has been given to torch.compile."""
    return "_orig_mod" in module._modules or module._compiled_call_impl is not None


def _around_compiled(module: nn.Module) -> list[Any]:
    """Return what a compiled module refers to, but for what torch.compile has made."""
    own = vars(nn.Module() if "_orig_mod" in module._modules else module)
    return [value for name, value in vars(module).items() if name in own and name != "_compiled_call_impl"]


def _kind(value: Any, tree: set[int]) -> _Kind | None:
    if id(value) in tree:
        return _Kind(_around_compiled, list) if _is_compiled(value) else _by_attributes(type(value))
    if type(value) is weakref.ReferenceType and value.__callback__ is not None:
        return None
    return _KINDS.get(type(value))


_SHARED = (type, ModuleType, logging.Logger)  # what everybody can reach, and much is reached from


def _modules_behind(value: Any, seen: set[int]) -> Iterator[nn.Module]:
    """Yield the modules that a value of any kind leads to, but for those behind what has been seen."""
    waiting = [value]
    while waiting:
        each = _referent(waiting.pop())
        if id(each) in seen or isinstance(each, _SHARED):
            continue
        seen.add(id(each))
        if isinstance(each, nn.Module):
            yield each
        if isinstance(each, FunctionType):  # not its globals
            waiting += [each.__closure__, each.__defaults__, each.__kwdefaults__, vars(each)]
        else:
            waiting += gc.get_referents(each)


def _referent(value: Any) -> Any:
    """Return what a weak reference refers to, and any other value itself."""
    if isinstance(value, weakref.ReferenceType):
        return value()
    try:
        return value.__repr__.__self__ if type(value) in weakref.ProxyTypes else value
    except ReferenceError:
        return None


def _name(value: Any) -> str:
    return getattr(value, "__qualname__", "") or f"an object of class {type(value).__name__}"
