"""The winner of a call: from a cache by the call's summary, else from the tables of its device."""

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastcnn.backend import changed
from fastcnn.overrides import constant_while_compiling
from fastcnn.tuning.call import call_of, describe, setting_of, text
from fastcnn.tuning.device import device_name
from fastcnn.tuning.table import Entries, load

logger = logging.getLogger("fastcnn")

MOST_CALLS = 4096  # that the cache holds


class Winner(NamedTuple):
    """What runs a call: a backend, and its algorithm where it has several."""

    backend: str
    algorithm: str | None

    def __str__(self) -> str:
        return self.backend if self.algorithm is None else f"{self.backend} {self.algorithm}"


class _Tables(dict[torch.device, Entries]):
    """The entries of each device, read when they are first wanted."""

    def __missing__(self, device: torch.device) -> Entries:
        name = device_name(device)
        self[device] = entries = load(name) if name else {}
        return entries


_tables = _Tables()
_found: dict[tuple[Any, ...], Winner | None] = {}

# Says why an op has no such backend and algorithm here, or returns an empty string.
Problem = Callable[[str, str, str | None], str]


def forget() -> None:
    """Forget the tables, so that they are read anew: after tuning, and in tests."""
    _tables.clear()
    _found.clear()
    changed()


def winner(op: str, arguments: tuple[Any, ...], problem: Problem) -> Winner | None:
    """Return what was measured fastest for a call of an op's function, or None where nothing was.

    Args:
        op: the op's stem.
        arguments: the function's, by position; the first is the input, a tensor.
        problem: says why an entry's backend cannot be had here; such an entry does not count.
    """
    if torch.compiler.is_compiling():
        return _winner_while_compiling(op, arguments, problem)
    device = arguments[0].device
    if not _tables[device]:
        return None
    call = call_of(op, arguments, setting_of(op, device.type))
    try:
        return _found[call]
    except KeyError:
        found = _find(call, _tables[device], problem)
    except TypeError:  # a size that is a symbol, or another argument without a hash
        return None
    if len(_found) >= MOST_CALLS:
        _found.clear()
    _found[call] = found
    return found


def _find(call: tuple[Any, ...], entries: Entries, problem: Problem) -> Winner | None:
    entry = entries.get(text(describe(call)))
    if entry is None:
        return None
    found = Winner(entry["backend"], entry["algorithm"])
    if reason := problem(call[0], *found):
        logger.warning("a tuning table names %s for %s, which is left out: %s", found, call[0], reason)
        return None
    return found


def _winner_while_compiling(op: str, arguments: tuple[Any, ...], problem: Problem) -> Winner | None:
    """Do the same while torch.compile traces: the tables are constants of the graph, and sizes that vary have no entry.

    Dynamo cannot tell a varying size from a fixed one but by its value: a fixed one equals some size of the table.
    """
    sizes = _sizes(op, arguments[0].device)
    for each in arguments:
        if isinstance(each, Tensor) and not all(_is_among(sizes, size) for size in each.shape):
            return None
    backend, _, algorithm = _constant(call_of(op, arguments, None), problem).partition(" ")
    return Winner(backend, algorithm or None) if backend else None


def _is_among(sizes: tuple[int, ...], size: int) -> bool:
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # slow to import, here imported long since

    return any(statically_known_true(size == each) for each in sizes)


@constant_while_compiling
def _sizes(op: str, device: torch.device) -> tuple[int, ...]:
    keys = [entry["key"] for entry in _tables[device].values() if entry["key"]["op"] == op]
    shapes = [[*key["input"], *key.get("other", ()), *key.get("weight", ())] for key in keys]
    return tuple({size for shape in shapes for size in shape})


@constant_while_compiling
def _constant(call: tuple[Any, ...], problem: Problem) -> str:
    op, device, *others, _ = call
    return str(_find((op, device, *others, setting_of(op, device.type)), _tables[device], problem) or "")
