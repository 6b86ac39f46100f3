"""Runs a fused network once without arithmetic, and notes each stage and what runs it."""

import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fastcnn import calls
from fastcnn import stages as fused_stages
from fastcnn.explain.layers import Row, names_of, row_of
from fastcnn.route import Route, listening


def run(model: nn.Module, input: Any) -> tuple[list[Row], set[int]]:
    """Run a model once on tensors without data; return its stages as they ran, and the ids of their layers.

    Raises TypeError for an `input` that is neither tensors nor sizes, RuntimeError where the model does not run on it.
    """
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
        notes.setdefault((_place(), row.names, shape), row)
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


def _inputs(model: nn.Module, input: Any, fakes: FakeTensorMode) -> tuple[Tensor, ...]:
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


def _place() -> tuple[Any, ...]:
    """Return the place of a stage in the call stack, so that two calls of the same layers differ."""
    return tuple((frame.f_code, frame.f_lasti) for frame, _ in traceback.walk_stack(sys._getframe(1)))
