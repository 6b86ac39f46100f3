"""Which layers of a fused network form stages, what runs them on an input, and why the others form none."""

import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastcnn import calls, roles
from fastcnn import stages as fused_stages
from fastcnn.rewrite.analysis import Analysis, analyse, is_row, role_of
from fastcnn.route import Route, listening

FUSIBLE = (nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d, nn.LocalResponseNorm, nn.Linear)  # that a stage may hold
_ROWS = (nn.Sequential, nn.ModuleList)


class Row(NamedTuple):
    """A stage, or a layer that runs by itself."""

    names: tuple[str, ...]  # of the layers, as in named_modules; of a function called in a forward, its text
    layers: tuple[str, ...]  # classes, or functions
    stage: str = ""  # the function of fastcnn.functional in short, such as conv+relu; empty for a layer by itself
    runs: str = ""  # backend and algorithm; empty where that is not known without an input
    shape: tuple[int, ...] = ()  # of the input; empty likewise
    reason: str = ""  # why a layer runs by itself, or why this runs a stage


def row_of(layers: tuple[object, ...], names: dict[int, str], texts: tuple[str, ...], roles: tuple[str, ...]) -> Row:
    """Return the row of layers that run as one; calls of functions have a text only."""
    named = tuple(names.get(id(layer), text) for layer, text in zip(layers, texts, strict=True))
    classes = tuple(_class_of(layer, text) for layer, text in zip(layers, texts, strict=True))
    return Row(named, classes, "+".join(roles))


def _class_of(layer: object, text: str) -> str:
    return type(layer).__name__ if isinstance(layer, nn.Module) else text


def stages(model: nn.Module) -> tuple[list[Row], set[int]]:
    """Return the stages of a fused model in the order of its modules, and the ids of their layers."""
    names = names_of(model)
    rows: list[Row] = []
    fused: set[int] = set()
    inner: set[int] = set()  # the rows that a row around them has taken in

    def add(layers: tuple[object, ...], texts: tuple[str, ...], roles: tuple[str, ...]) -> None:
        rows.append(row_of(layers, names, texts, roles))
        fused.update(map(id, layers))

    def add_parts(layers: tuple[object, ...]) -> None:
        for stage, part in fused_stages.parts_of(layers):
            if stage:
                add(part, ("",) * len(part), stage.roles)
        inner.update(id(each) for layer in layers if isinstance(layer, nn.Module) for each in _rows_taken_in(layer))

    analyses, walked = _analyses(model)
    for module, analysis in analyses:
        role = role_of(module)
        if role in ("pool", "lrn"):  # the same forward pools with any settings
            if id(module) not in fused and roles.role_of(module):
                add((module,), ("",), (role,))
        elif is_row(module) and id(module) not in walked | inner:
            add_parts(tuple(module._modules.values()))
        for found in analysis.found:
            layers = tuple(analysis.layers.get(text, text) for text in found.texts)
            if not found.roles:
                add_parts(tuple(analysis.layers[found.texts[0]].children()))
            elif roles.ROW in found.roles:
                add_parts(layers)
            elif all(roles.role_of(layer) for layer in layers if isinstance(layer, nn.Module)):
                add(layers, found.texts, found.roles)
    return rows, fused


def _rows_taken_in(layer: nn.Module) -> Iterator[nn.Module]:
    if roles.role_of(layer) == roles.ROW:
        yield layer
        for child in layer.children():
            yield from _rows_taken_in(child)


def stages_run(model: nn.Module, input: Any) -> tuple[list[Row], set[int]]:
    """Run a model once on tensors without data; return its stages as they ran, and the ids of their layers.

    Raises TypeError for an `input` that is neither tensors nor sizes, RuntimeError where the model does not run on it.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode  # it brings in much of torch that nobody else needs

    names = names_of(model)
    notes: dict[tuple[Any, ...], Row] = {}
    fused: set[int] = set()
    routes: list[Route] = []

    def note(roles: tuple[str, ...], function: Callable[..., Any], input: Any, layers: tuple[Any, ...]) -> Any:
        routes.clear()
        output = function(input, *layers)
        texts = tuple(_FUNCTIONS.get(type(layer), "") for layer in layers)
        runs, reason = _said(routes)
        shape = tuple(input.shape) if isinstance(input, Tensor) else ()
        row = row_of(layers, names, texts, roles)._replace(runs=runs, shape=shape, reason=reason)
        stack = traceback.walk_stack(sys._getframe(1))  # two calls of the same layers differ in their place there
        notes.setdefault((tuple((frame.f_code, frame.f_lasti) for frame, _ in stack), row.names, shape), row)
        fused.update(map(id, layers))
        return output

    heard = listening(lambda op, arguments, route: routes.append(route))
    with FakeTensorMode(allow_non_fake_inputs=True) as fakes, fused_stages.noting(note), heard:
        inputs = _inputs(model, input, fakes)
        state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        try:
            torch.func.functional_call(model, {name: fakes.from_tensor(each) for name, each in state.items()}, inputs)
        except Exception as error:
            shapes = ", ".join("x".join(map(str, each.shape)) for each in inputs)
            raise RuntimeError(f"input: the model does not run on an input of {shapes}: {error}") from error
    return list(notes.values()), fused


def _inputs(model: nn.Module, input: Any, fakes: Any) -> tuple[Tensor, ...]:
    if isinstance(input, Tensor):
        return (fakes.from_tensor(input),)
    if isinstance(input, Sequence) and input and all(isinstance(each, Tensor) for each in input):
        return tuple(map(fakes.from_tensor, input))
    if not isinstance(input, Sequence) or not input or not all(isinstance(each, int) and each > 0 for each in input):
        raise TypeError(f"input: expected a tensor, its sizes as (1, 3, 224, 224), or a row of tensors, got {input!r}")
    like = next((each for each in model.parameters() if each.is_floating_point()), torch.empty(0))
    return (torch.empty(tuple(input), dtype=like.dtype, device=like.device),)


def _said(routes: list[Route]) -> tuple[str, str]:
    """Return what runs a stage, and why; of several routes (a batch norm that is not folded) those of kernels."""
    kernels = [route for route in routes if route.backend != "torch"]
    told = kernels or routes[-1:]  # the last one asked runs the layers
    if not told:
        return "torch", "the input is not a tensor"
    return " and ".join(dict.fromkeys(map(str, told))), told[0].reason


_FUNCTIONS: dict[Any, str] = {  # by the class of a call's settings
    calls.ReLU: "F.relu",
    calls.MaxPool2d: "F.max_pool2d",
    calls.LocalResponseNorm: "F.local_response_norm",
    calls.BatchNorm: "F.batch_norm",
    calls.Dropout: "F.dropout",
    calls.Add: "+",
}


def alone(model: nn.Module, fused: set[int]) -> Iterator[Row]:
    """Yield the layers that could be fused and are not; `fused` are the ids of those that are."""
    names = names_of(model)
    said = set(fused)
    analyses, walked = _analyses(model)
    for parent, analysis in analyses:
        if id(parent) in walked:
            analysis = analysis._replace(reason="whose layers a forward calls one by one")
        for child in parent.children():
            if isinstance(child, FUSIBLE) and id(child) not in said:
                said.add(id(child))
                reason = _own_reason(child) or _reason(child, parent, analysis)
                yield Row((names[id(child)],), (type(child).__name__,), reason=reason)
    if isinstance(model, FUSIBLE) and id(model) not in said:
        yield Row(("",), (type(model).__name__,), reason=_own_reason(model) or "the whole model")


def names_of(model: nn.Module) -> dict[int, str]:
    """Return the first name of each module."""
    return {id(module): name for name, module in model.named_modules()}


def _analyses(model: nn.Module) -> tuple[list[tuple[nn.Module, Analysis]], set[int]]:
    """Analyse every module, and return the ids of the rows whose layers a forward calls one by one."""
    modules = [each for each in model.modules() if not isinstance(each, torch.jit.ScriptModule)]
    analyses = [(module, analyse(module)) for module in modules]
    return analyses, {each for _, analysis in analyses for each in analysis.walked}


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
    hooks = [kind.strip("_").replace("_", " ") for kind in roles.HOOKS if layer.__dict__[kind]]
    return f"it has {' and '.join(hooks)}" if hooks else ""


def _reason(layer: nn.Module, parent: nn.Module, analysis: Analysis) -> str:
    if is_row(parent) and not analysis.reason:
        row = list(parent.children())
        return _between(layer, [type(each).__name__ for each in row], row.index(layer))
    if analysis.reason:
        return f"in {type(parent).__name__}, {analysis.reason}"
    if isinstance(parent, _ROWS):
        return f"the forward that calls the layers of its {type(parent).__name__} does not show their order"
    if type(parent).forward.__module__.startswith("torch.nn."):
        return f"a part of torch's {type(parent).__name__}"
    text = next((text for text, module in analysis.layers.items() if module is layer), None)
    places = [(chain, i) for chain in analysis.chains for i, each in enumerate(chain) if each == text]
    if not places:
        return "the forward does not show which layers come before and after it"
    if len(places) > 1:
        return f"called {len(places)} times, never in a stage"
    chain, place = places[0]
    return _between(layer, [_class_of(analysis.layers.get(each), each) for each in chain], place)


def _between(layer: nn.Module, row: list[str], place: int) -> str:
    """Tell, by the classes and functions of a row, what stands where this layer's stage would go on."""
    if isinstance(layer, nn.ReLU):
        return f"after {row[place - 1]}" if place else "first of its row"
    return f"before {row[place + 1]}" if place + 1 < len(row) else "last of its row"
