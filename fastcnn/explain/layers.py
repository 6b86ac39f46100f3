"""Which layers of a fused network form stages, and why the others do not, without running it."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn

from fastcnn import roles
from fastcnn import stages as fused_stages
from fastcnn.rewrite.analysis import Analysis, analyse, is_row, role_of

_KINDS: tuple[type[nn.Module], ...] = (
    nn.Conv2d,
    nn.BatchNorm2d,
    nn.ReLU,
    nn.MaxPool2d,
    nn.LocalResponseNorm,
    nn.Linear,
)
FUSIBLE = tuple(kind for kind in _KINDS if kind.forward in roles.ROLES)  # that a stage may hold
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_ROWS = (nn.Sequential, nn.ModuleList)


class Group(NamedTuple):
    """Layers that run as one stage; where they have run, also what ran them, why, and the input's shape."""

    names: tuple[str, ...]
    layers: tuple[str, ...]
    roles: tuple[str, ...]
    modules: tuple[nn.Module, ...]
    runs: str = ""
    reason: str = ""
    shape: tuple[int, ...] = ()


def group_of(
    layers: tuple[object, ...], names: dict[int, str], texts: tuple[str, ...], roles: tuple[str, ...]
) -> Group:
    """Return the names of layers that run as one; calls of functions have a text only."""
    modules = tuple(layer for layer in layers if isinstance(layer, nn.Module))
    named = tuple(names.get(id(layer), text) for layer, text in zip(layers, texts, strict=True))
    classes = tuple(
        type(layer).__name__ if isinstance(layer, nn.Module) else text
        for layer, text in zip(layers, texts, strict=True)
    )
    return Group(named, classes, roles, modules)


def stages(model: nn.Module) -> list[Group]:
    """Return the stages of a fused model in the order of its modules."""
    names = names_of(model)
    groups: list[Group] = []
    analyses, walked = _analyses(model)
    for module, analysis in analyses:
        if role_of(module) in ("pool", "lrn"):  # the same forward pools with any settings
            if not any(module is each for group in groups for each in group.modules) and _runs(module):
                groups.append(group_of((module,), names, ("",), (role_of(module) or "",)))
        elif is_row(module) and id(module) not in walked:
            groups += _stages_in_a_row(module, names)
        for found in analysis.found:
            if not found.roles:
                groups += _stages_in_a_row(analysis.layers[found.texts[0]], names)
                continue
            layers = tuple(analysis.layers.get(text, text) for text in found.texts)
            if all(_runs(layer) for layer in layers if isinstance(layer, nn.Module)):
                groups.append(group_of(layers, names, found.texts, found.roles))
    return groups


def alone(model: nn.Module, fused: set[int]) -> Iterator[tuple[str, nn.Module, str]]:
    """Yield the layers that could be fused and are not: name, layer, reason; `fused` are the ids of those that are."""
    names = names_of(model)
    said: set[int] = set()
    analyses, walked = _analyses(model)
    for parent, analysis in analyses:
        if id(parent) in walked:
            analysis = analysis._replace(reason="whose layers a forward calls one by one")
        for child in parent.children():
            if isinstance(child, FUSIBLE) and id(child) not in fused | said:
                said.add(id(child))
                yield names[id(child)], child, _own_reason(child) or _reason(child, parent, analysis)
    if isinstance(model, FUSIBLE) and id(model) not in fused | said:
        yield "", model, _own_reason(model) or "the whole model"


def names_of(model: nn.Module) -> dict[int, str]:
    """Return the first name of each module."""
    return {id(module): name for name, module in model.named_modules()}


def _analyses(model: nn.Module) -> tuple[list[tuple[nn.Module, Analysis]], set[int]]:
    """Analyse every module, and return the ids of the rows whose layers a forward calls one by one."""
    modules = [each for each in model.modules() if not isinstance(each, torch.jit.ScriptModule)]
    analyses = [(module, analyse(module)) for module in modules]
    return analyses, {each for _, analysis in analyses for each in analysis.walked}


def _runs(layer: nn.Module) -> bool:
    return roles.role_of(layer) is not None


def _stages_in_a_row(container: nn.Module, names: dict[int, str]) -> Iterator[Group]:
    layers = tuple(container.children())
    if isinstance(container, nn.Sequential):
        layers = tuple(container)  # a layer that stands twice runs twice
    for stage, row in fused_stages.parts_of(layers):
        if stage:
            yield group_of(row, names, ("",) * len(row), stage.roles)


def _own_reason(layer: nn.Module) -> str:
    """Say why a layer fits into no stage, whatever is beside it, or return an empty string."""
    if "forward" in layer.__dict__:
        return "its forward has been replaced on the instance"
    unfusable = isinstance(layer, nn.Conv2d) and roles.role_of(layer) is None and not _held(layer)
    if role_of(layer) is None or unfusable:
        return "its class has a forward of its own"
    return _held(layer)


def _held(layer: nn.Module) -> str:
    if type(layer).__call__ is not roles.STOCK_CALL:
        return "its class has a __call__ of its own"
    if layer.__dict__.get("_compiled_call_impl"):
        return "it is compiled by itself"
    hooks = [kind.strip("_").replace("_", " ") for kind in _HOOKS if layer.__dict__[kind]]
    return f"it has {' and '.join(hooks)}" if hooks else ""


def _reason(layer: nn.Module, parent: nn.Module, analysis: Analysis) -> str:
    if is_row(parent) and not analysis.reason:
        row = list(parent.children())
        place = row.index(layer)
        return _between(layer, _class_at(row, place - 1), _class_at(row, place + 1))
    if analysis.reason:
        return f"in {type(parent).__name__}, {analysis.reason}"
    if isinstance(parent, _ROWS):
        return f"the forward that calls the layers of its {type(parent).__name__} does not show their order"
    if type(parent).forward.__module__.startswith("torch.nn."):
        return f"a part of torch's {type(parent).__name__}"
    return _in_chains(layer, analysis)


def _in_chains(layer: nn.Module, analysis: Analysis) -> str:
    text = next((text for text, module in analysis.layers.items() if module is layer), None)
    places = [(chain, i) for chain in analysis.chains for i, each in enumerate(chain) if each == text]
    if not places:
        return "the forward does not show which layers come before and after it"
    if len(places) > 1:
        return f"called {len(places)} times, never in a stage"
    chain, place = places[0]
    before = chain[place - 1] if place else ""
    after = chain[place + 1] if place + 1 < len(chain) else ""
    return _between(layer, _named(before, analysis), _named(after, analysis))


def _named(text: str, analysis: Analysis) -> str:
    return type(analysis.layers[text]).__name__ if text in analysis.layers else text


def _class_at(row: list[nn.Module], place: int) -> str:
    return type(row[place]).__name__ if 0 <= place < len(row) else ""


def _between(layer: nn.Module, before: str, after: str) -> str:
    if isinstance(layer, nn.ReLU):
        return f"after {before}" if before else "first of its row"
    return f"before {after}" if after else "last of its row"
