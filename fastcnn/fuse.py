"""Make an existing network run fused, and back: its modules stay and get other methods."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from fastcnn.instance import has_methods, remove_methods, set_methods
from fastcnn.rewrite.analysis import analyse, is_row, role_of

__all__ = ["fuse", "unfuse"]

logger = logging.getLogger("fastcnn")


def fuse(model: nn.Module) -> nn.Module:
    """Let a model run its layers through fastcnn's fused functions, in place, and return it.

    Every module stays the same object of the same class; only the `forward` of some instances changes: of each
    `nn.Sequential`, of each `nn.MaxPool2d` and `nn.LocalResponseNorm` outside of one, and of each module that calls its
    layers in a forward of its own. In such a forward, layers called one after another, as in
    ``F.max_pool2d(F.relu(self.conv1(x)), 2)``, become one call, also where an ``if`` may leave one out. At each run the
    layers run as one stage if they are plain and carry no hooks. All else in the forward stays: branches, side effects,
    attributes that it reads. A forward whose source cannot be read stays as it is; the log `fastcnn` says why, and at
    level INFO which stages were found. `fastcnn.explain` shows both.

    A copy of a fused model is fused. A saved whole model holds stock modules and loads without fastcnn: fuse it after
    loading. Slices of a Sequential and layers set later are stock too. A module whose `forward` other code has set on
    the instance is left alone.

    Raises TypeError unless `model` is an `nn.Module`, and if it is scripted or compiled: fuse first, then compile.

    Example:
        >>> import fastcnn
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.MaxPool2d(2))
        >>> fastcnn.fuse(model) is model
        True
        >>> type(model)
        <class 'torch.nn.modules.container.Sequential'>
    """
    _check(model)
    modules = [each for each in model.modules() if not isinstance(each, torch.jit.ScriptModule)]
    # The pools and norms of a Sequential run in its stages.
    in_rows = {id(child) for parent in modules if is_row(parent) for child in parent.children()}
    for module in modules:
        remove_methods(module)
        analysis = analyse(module)
        _say(module, analysis.reason, [each.source for each in analysis.found])
        if analysis.methods and not (id(module) in in_rows and role_of(module)):
            set_methods(module, analysis.methods)
    return model


def unfuse(model: nn.Module) -> nn.Module:
    """Undo `fuse`, in place, and return the model: its modules run the forward of their classes again.

    A `forward` that other code has set on an instance stays. The layers of `fastcnn.nn` still run fused, as their
    classes do. Raises TypeError as `fuse` does.

    Example:
        >>> import fastcnn
        >>> model = fastcnn.unfuse(fastcnn.MnistCNN())  # runs torch's layers alone
    """
    _check(model)
    for module in model.modules():
        remove_methods(module)
    return model


def is_fused(model: nn.Module) -> bool:
    """Whether `fuse` has set methods on any module of a model."""
    return any(has_methods(module) for module in model.modules())


@contextmanager
def fused(model: nn.Module) -> Iterator[nn.Module]:
    """Fuse a model during the block; afterwards only the modules fused before are fused."""
    _check(model)
    before = {id(module) for module in model.modules() if has_methods(module)}
    try:
        yield fuse(model)
    finally:
        for module in model.modules():
            if id(module) not in before:
                remove_methods(module)


def _check(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(f"model: expected no scripted model, got a {type(model).__name__}; fuse before scripting")
    if "_orig_mod" in model._modules or model._compiled_call_impl is not None:
        raise TypeError(f"model: expected no compiled model, got a {type(model).__name__}; fuse before compiling")


_said: set[str] = set()


def _say(module: nn.Module, reason: str, stages: list[str]) -> None:
    """Log, once each, why a forward stays as it is, or which stages are in it."""
    title = f"{type(module).__module__}.{type(module).__qualname__}"
    message = f"fuse runs in stages, in {title}: {'; '.join(stages)}" if stages else ""
    if reason and any(role_of(child) for child in module.children()):
        message = f"fuse leaves {title} as it is: {reason}"
    if message and message not in _said:
        _said.add(message)
        logger.info(message)
