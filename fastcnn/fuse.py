"""Make an existing network run fused, and back: the same layers and parameters under other containers."""

import logging
from collections import OrderedDict
from collections.abc import Callable
from types import MethodType
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.nn.modules.module import _WrappedHook

from fastcnn.nn import LocalResponseNorm, MaxPool2d, Sequential
from fastcnn.rewrite.analysis import analyse, role_of, stock_class
from fastcnn.rewrite.classes import inherits_rewritten, rewritten_class

__all__ = ["fuse", "unfuse"]

logger = logging.getLogger("fastcnn")

# Tells the class that a module shall have.
_ClassOf: TypeAlias = Callable[[nn.Module], type[nn.Module]]

_FUSED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Sequential: Sequential,
    nn.MaxPool2d: MaxPool2d,
    nn.LocalResponseNorm: LocalResponseNorm,
}
_STOCK = {fused: stock for stock, fused in _FUSED.items()}


def fuse(model: nn.Module) -> nn.Module:
    """Make a model that runs `model`'s own layers and parameters through fastcnn's fused functions.

    Each `nn.Sequential` becomes a `fastcnn.nn.Sequential` of the same children, each `nn.MaxPool2d` and
    `nn.LocalResponseNorm` elsewhere its twin of `fastcnn.nn`. A network that calls its layers in a forward of its own
    becomes one of a subclass, of the same name, in whose forward layers called one after another, such as
    ``F.max_pool2d(F.relu(self.conv1(x)), 2)``, are one call; whether they run as one is decided at each run, by what
    the layers are then and whether they carry hooks. All else in the forward stays: branches, side effects, attributes
    that it reads. A forward whose source cannot be read stays as it is, and the log `fastcnn` says why; at level INFO
    it also tells what was found. `fastcnn.explain` shows both.

    `model` itself is left alone. The two share every layer, parameter, buffer and hook: training either trains both.
    Names, keys and print stay equal. Where there is nothing to fuse, `model` itself comes back.

    Raises TypeError for what is not an `nn.Module`, or is scripted or compiled: fuse first, then compile.

    Example:
        >>> import fastcnn
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.MaxPool2d(2))
        >>> fused = fastcnn.fuse(model)
        >>> type(fused)
        <class 'fastcnn.nn.Sequential'>
        >>> fused[0] is model[0]
        True
    """
    _check(model)
    # The pools and norms of a Sequential run in its stages: they stay the very objects they are.
    kept = {
        id(child): child
        for parent in model.modules()
        if type(parent) in (nn.Sequential, Sequential)
        for child in parent.children()
        if type(child) in (nn.MaxPool2d, nn.LocalResponseNorm)
    }
    return _converted(model, _fused_class, done=dict(kept))


def unfuse(model: nn.Module) -> nn.Module:
    """Undo `fuse`: make a model of the same layers and parameters whose containers and pools are torch's own.

    It also turns the `fastcnn.nn.Sequential` of fastcnn's models, for instance before `torch.jit.script`, into
    `nn.Sequential`; `ConvReLU2d` and `ConvReLUMaxPool2d` stay, as no stock layer does the same. Sharing and errors are
    as in `fuse`.

    Example:
        >>> import fastcnn
        >>> type(fastcnn.unfuse(fastcnn.MnistCNN()).fc)
        <class 'torch.nn.modules.container.Sequential'>
    """
    _check(model)
    return _converted(model, _unfused_class, done={})


def _check(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(f"model: expected layers in Python, got a {type(model).__name__}; fuse before scripting")


def _fused_class(module: nn.Module) -> type[nn.Module]:
    kind = type(module)
    if kind in _FUSED:
        return _FUSED[kind]
    if stock_class(kind) is not kind or inherits_rewritten(kind):  # fused before
        return kind
    analysis = analyse(module)
    if analysis.reason and any(role_of(child) for child in module.children()):
        _say_once(f"fuse leaves {_title(kind)} as it is: {analysis.reason}")
    if not analysis.plan:
        return kind
    stages = "; ".join(stage.source for stage in analysis.found) or "its children in a row"
    _say_once(f"fuse runs in stages, in {_title(kind)}: {stages}")
    return rewritten_class(kind, analysis.plan)


def _title(kind: type[nn.Module]) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _unfused_class(module: nn.Module) -> type[nn.Module]:
    return _STOCK.get(type(module), stock_class(type(module)))


_said: set[str] = set()


def _say_once(message: str) -> None:
    if message not in _said:
        _said.add(message)
        logger.info(message)


def _converted(module: nn.Module, class_of: _ClassOf, done: dict[int, nn.Module]) -> nn.Module:
    """Give `module` under other classes; `done` keeps a module that stands in two places one module."""
    if id(module) not in done:
        done[id(module)] = _convert(module, class_of, done)
    return done[id(module)]


def _convert(module: nn.Module, class_of: _ClassOf, done: dict[int, nn.Module]) -> nn.Module:
    if isinstance(module, torch.jit.ScriptModule):  # its forward is compiled and would not see new children
        return module
    children = {name: child and _converted(child, class_of, done) for name, child in module._modules.items()}
    new_class = class_of(module)
    if new_class is type(module) and all(child is module._modules[name] for name, child in children.items()):
        return module
    return _shell(module, new_class, children)


def _shell(module: nn.Module, new_class: type[nn.Module], children: dict[str, nn.Module | None]) -> nn.Module:
    """Copy `module` shallowly: its own attributes, parameters, buffers and hooks, but other children."""
    if "_orig_mod" in children or module._compiled_call_impl is not None:
        raise TypeError(f"model: expected layers not compiled yet, got a compiled {type(module).__name__}")
    shell = object.__new__(new_class)  # no __init__: it would make new parameters
    shell.__dict__.update({name: _rebound(value, module, shell) for name, value in module.__dict__.items()})
    shell._modules = children
    # These hooks hold a weak reference to their module, and the original may be dropped before the copy is.
    hooks: dict[int, Any] = module._load_state_dict_pre_hooks
    shell._load_state_dict_pre_hooks = OrderedDict(
        (key, _WrappedHook(hook.hook, shell) if hook.with_module else hook) for key, hook in hooks.items()
    )
    return shell


def _rebound(value: Any, module: nn.Module, shell: nn.Module) -> Any:
    """Turn a method bound to `module`, kept as an attribute, into the same method of `shell`."""
    if isinstance(value, MethodType) and value.__self__ is module:
        return MethodType(value.__func__, shell)
    return value
