"""Make an existing network run fused, and back: the same layers and parameters under other containers."""

import logging
from collections.abc import Callable, Collection
from typing import TypeAlias

import torch
from torch import nn

from fastcnn.nn import LocalResponseNorm, MaxPool2d, Sequential
from fastcnn.rewrite.analysis import analyse, role_of, stock_class
from fastcnn.rewrite.classes import inherits_rewritten, rewritten_class
from fastcnn.rewrite.references import copies, references

__all__ = ["fuse", "unfuse"]

logger = logging.getLogger("fastcnn")

# Tells the class that a module shall have, given why it must stay as it is or an empty string.
_ClassOf: TypeAlias = Callable[[nn.Module, str], type[nn.Module]]

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

    `model` itself is left alone. The two share layers, parameters and buffers: training either trains both. Names, keys
    and print stay equal. Where there is nothing to fuse, `model` itself comes back. Use one of the two afterwards:
    modules that run fused, and what refers to them, have a mode, attributes and hooks of their own. Modules that a
    closure, or an object other than a list, a dict, a method or the like, refers to stay as they are; the log says so.

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
        child
        for parent in model.modules()
        if type(parent) in (nn.Sequential, Sequential)
        for child in parent.children()
        if type(child) in (nn.MaxPool2d, nn.LocalResponseNorm)
    }
    return _converted(model, _fused_class, kept)


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
    return _converted(model, _unfused_class)


def _check(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(f"model: expected layers in Python, got a {type(model).__name__}; fuse before scripting")


def _fused_class(module: nn.Module, fixed: str) -> type[nn.Module]:
    kind = type(module)
    if kind in _FUSED:
        return _unless(fixed, kind, _FUSED[kind])
    if stock_class(kind) is not kind or inherits_rewritten(kind):  # fused before
        return kind
    analysis = analyse(module)
    if analysis.reason and any(role_of(child) for child in module.children()):
        _say_once(f"fuse leaves {_title(kind)} as it is: {analysis.reason}")
    if not analysis.plan:
        return kind
    if not fixed:
        stages = "; ".join(stage.source for stage in analysis.found) or "its children in a row"
        _say_once(f"fuse runs in stages, in {_title(kind)}: {stages}")
    return _unless(fixed, kind, rewritten_class(kind, analysis.plan))


def _unless(fixed: str, kind: type[nn.Module], new_class: type[nn.Module]) -> type[nn.Module]:
    """Return the new class of a module of class `kind`, or `kind` where there is a reason against it."""
    if fixed and new_class is not kind:
        _say_once(f"fuse leaves {_title(kind)} as it is: {fixed}")
        return kind
    return new_class


def _title(kind: type[nn.Module]) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _unfused_class(module: nn.Module, fixed: str) -> type[nn.Module]:
    kind = type(module)
    return _unless(fixed, kind, _STOCK.get(kind, stock_class(kind)))


_said: set[str] = set()


def _say_once(message: str) -> None:
    if message not in _said:
        _said.add(message)
        logger.info(message)


def _converted(model: nn.Module, class_of: _ClassOf, kept: Collection[nn.Module] = ()) -> nn.Module:
    """Give `model` under other classes, but for the modules in `kept`."""
    found = references(model)
    classes: dict[int, type[nn.Module]] = {}
    for module in model.modules():
        scripted = isinstance(module, torch.jit.ScriptModule)  # its forward is compiled and would not see new children
        if scripted or module in kept:
            continue
        new_class = class_of(module, found.fixed.get(id(module), ""))
        if new_class is not type(module):
            classes[id(module)] = new_class
    converted: nn.Module = copies(found, classes).get(id(model), model)
    return converted
