"""The front: Python plans a call once, fastcnn._front (C++) runs it from then on; without it Python runs every call.

It passes on to the Python path: tensor subclasses, torch.func, tracing, modes, hooks on saved tensors, symbolic sizes,
forward-mode derivatives.
"""

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from fastcnn import backend
from fastcnn.available import _BUILD, _PLAYED


def _load() -> tuple[Any, str]:
    """Return the compiled front, or None and the reason why it cannot be used."""
    try:
        return importlib.import_module("fastcnn._front"), ""
    except ImportError as error:
        if importlib.util.find_spec("fastcnn._front") is None:
            return None, "it was not built"
        reason = str(error).splitlines()[0]
        if "undefined symbol" in reason:  # the linker misses a symbol of torch before the front can compare versions
            reason = f"it was built for another torch, this is torch {torch.__version__}"
        return None, f"{reason}; build it again: {_BUILD}"


_front, problem = _load()
_numbers: dict[backend.Choice, int] = {}  # of the choices that threads have made


def _number(choice: backend.Choice | None) -> int:
    return 0 if choice is None else _numbers.setdefault(choice, len(_numbers) + 1)


def choose() -> None:
    """Tell the front which backend this thread and the process have chosen: every choice has plans of its own."""
    if _front:
        _front.choose(_number(backend.own_choice()), _number(backend.process.choice))


def forget() -> None:
    """Drop every plan."""
    if _front:
        _front.forget()


if _front:
    backend.choice_watchers.append(choose)
    backend.table_watchers.append(forget)
    choose()
    if _PLAYED:
        _front.watch_precision()


def fronted(stem: str, plan: Callable[..., Any], check: Callable[..., Any], python: Callable[..., Any]) -> Any:
    """Return what runs the calls of an op's function: by what `plan` returns, or, where that is None, by `python`.

    After the stock layers have raised an error, `check` raises a clearer one, if it knows one.
    """
    return _front.function(stem, plan, check, python) if _front else python


@contextmanager
def aside() -> Iterator[None]:
    """Send every call down the Python path while the block runs."""
    if _front:
        _front.aside(1)
    try:
        yield
    finally:
        if _front:
            _front.aside(-1)
