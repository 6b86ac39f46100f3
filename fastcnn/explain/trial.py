"""One run of a fused network without arithmetic, in which each stage is noted, and what runs it."""

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastcnn import backend, calls
from fastcnn import stages as fused_stages
from fastcnn.explain.layers import Ran, group_of, names_of


def trial(model: nn.Module, input: Any) -> list[Ran]:
    """Run a model once on tensors without data, and return its stages in the order in which they ran.

    Raises:
        TypeError: `input` is neither tensors nor sizes.
        RuntimeError: the model does not run on it.
    """
    notes: dict[tuple[Any, ...], Ran] = {}
    with FakeTensorMode(allow_non_fake_inputs=True) as fakes, _noting(model, notes):
        inputs = _inputs(model, input, fakes)
        state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        try:
            torch.func.functional_call(model, {name: fakes.from_tensor(each) for name, each in state.items()}, inputs)
        except Exception as error:
            shapes = ", ".join("x".join(map(str, each.shape)) for each in inputs)
            raise RuntimeError(f"input: the model does not run on an input of {shapes}: {error}") from error
    return list(notes.values())


def _inputs(model: nn.Module, input: Any, fakes: FakeTensorMode) -> tuple[Tensor, ...]:
    if isinstance(input, Tensor):
        return (fakes.from_tensor(input),)
    if isinstance(input, Sequence) and input and all(isinstance(each, Tensor) for each in input):
        return tuple(map(fakes.from_tensor, input))
    if not isinstance(input, Sequence) or not input or not all(isinstance(each, int) and each > 0 for each in input):
        raise TypeError(f"input: expected a tensor, its sizes such as (1, 3, 224, 224), or tensors, got {input!r}")
    like = next((each for each in model.parameters() if each.is_floating_point()), torch.empty(0))
    return (torch.empty(tuple(input), dtype=like.dtype, device=like.device),)


class _Operators(TorchDispatchMode):
    """Notes which of fastcnn's operators run: their backend, and the algorithm where they name one."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "fastcnn":
            named = dict(zip((each.name for each in func._schema.arguments), args))
            self.seen.append(" ".join(filter(None, (func._overloadname, named.get("algorithm")))))
        return func(*args, **(kwargs or {}))


class _Messages(logging.Handler):
    """Keeps what `auto` says when it runs the stock layers."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.reasons: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if isinstance(record.args, tuple) and len(record.args) == 3:
            self.reasons.append(str(record.args[1]))


@contextmanager
def _noting(model: nn.Module, notes: dict[tuple[Any, ...], Ran]) -> Iterator[None]:
    """Note each stage, wherever the layers run it: in a row, or a pool or norm by itself."""
    names, messages = names_of(model), _Messages()
    stage_at, logger = fused_stages.stage_at, logging.getLogger("fastcnn")

    def noted(run: Callable[..., Any], roles: tuple[str, ...]) -> Callable[..., Any]:
        def note(input: Any, *layers: Any) -> Any:
            messages.reasons.clear()
            with patch.object(backend, "_said", set()), _Operators() as operators:
                output = run(input, *layers)
            texts = tuple(map(_text, layers))
            group = group_of(layers, names, texts, roles)
            runs = " and ".join(dict.fromkeys(operators.seen)) or "torch"
            reason = "" if operators.seen else next(iter(messages.reasons), _stock_reason())
            shape = tuple(input.shape) if isinstance(input, Tensor) else ()
            notes.setdefault((_line(), group.names, shape), Ran(group, runs, shape, reason))
            return output

        return note

    def noted_stage_at(*args: Any) -> Any:
        stage = stage_at(*args)
        return stage and stage._replace(run=noted(stage.run, stage.roles))

    level = logger.level
    with ExitStack() as stack:
        stack.enter_context(patch.object(fused_stages, "stage_at", noted_stage_at))
        stack.enter_context(patch.object(fused_stages, "run_max_pool", noted(fused_stages.run_max_pool, ("pool",))))
        stack.enter_context(patch.object(fused_stages, "run_lrn", noted(fused_stages.run_lrn, ("lrn",))))
        stack.callback(logger.setLevel, level)
        stack.callback(logger.removeHandler, messages)
        logger.addHandler(messages)
        logger.setLevel(logging.INFO)
        yield


def _stock_reason() -> str:
    return "the backend asked for" if backend._choice.backend == "torch" else "measured the fastest here"


_FUNCTIONS: dict[Any, str] = {
    calls.ReLU: "F.relu",
    calls.MaxPool2d: "F.max_pool2d",
    calls.LocalResponseNorm: "F.local_response_norm",
    calls.Dropout: "F.dropout",
    calls.Add: "+",
}


def _text(layer: Any) -> str:
    """Name the function whose settings stand for a call of it."""
    return _FUNCTIONS.get(type(layer), "")


def _line() -> tuple[str, int]:
    """Return the place in the user's forward that runs the stage, which tells calls of functions apart."""
    frame = sys._getframe(2)
    while frame.f_back and frame.f_globals.get("__name__") in ("fastcnn.nn", __name__):
        frame = frame.f_back
    return frame.f_code.co_filename, frame.f_lineno
