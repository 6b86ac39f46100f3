"""The winner of a call: from a cache by the call's summary, else from the table of its device."""

import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastcnn.backend import tables_changed
from fastcnn.overrides import constant_while_compiling
from fastcnn.parameters import CONSTANT, FREE, RECORDS
from fastcnn.tuning import telling
from fastcnn.tuning.call import batch_of, call_of, describe, setting_of, text, without_batch
from fastcnn.tuning.device import device_name
from fastcnn.tuning.table import Entries, Winner, load

logger = logging.getLogger("fastcnn")

MOST_CALLS = 4096  # that the cache holds


class Found(NamedTuple):
    """The winner of a call, with the batch and the reason of its table entry."""

    winner: Winner
    batch: int | None = None  # that was measured, where it is not the call's own
    why: str = ""  # the winner is stock, where no time decided it


class Table:
    """The entries of a device, by key, and, as they serve other batches too, by the key without its batch."""

    def __init__(self, entries: Entries) -> None:
        self.entries: Entries = {}
        self._similar: dict[str, dict[int, dict[str, Any]]] = {}
        for entry in entries.values():
            self.add(entry)

    def add(self, entry: dict[str, Any]) -> None:
        """Add an entry, in place of one with the same key."""
        self.entries[text(entry["key"])] = entry
        if batch := batch_of(entry["key"]):
            self._similar.setdefault(without_batch(entry["key"]), {})[batch] = entry

    def serving(self, key: dict[str, Any]) -> Iterator[tuple[int | None, dict[str, Any]]]:
        """Yield the entries that serve a call, the best first: its own, then those of half to double its batch."""
        if own := self.entries.get(text(key)):
            yield None, own
        if batch := batch_of(key):
            similar = self._similar.get(without_batch(key), {})
            near = [each for each in similar if each != batch and batch <= 2 * each <= 4 * batch]
            for measured in sorted(near, key=lambda each: (max(each, batch) / min(each, batch), each)):
                yield measured, similar[measured]


@functools.cache
def _table(device: torch.device) -> Table:
    """Return the table of a device, read when it is first wanted; GPUs of one model share it."""
    return _table_of(device_name(device))


@functools.cache
def _table_of(name: str) -> Table:
    return Table(load(name) if name else {})


_found: dict[tuple[Any, ...], Found | None] = {}

# Says why an op has no such backend and algorithm here, or returns an empty string.
Problem = Callable[[str, str, str | None], str]


def forget() -> None:
    """Drop the tables from memory, so that they are read again: after tuning, and in tests."""
    _table.cache_clear()
    _table_of.cache_clear()
    _found.clear()
    tables_changed()


def learn(device: torch.device, entry: dict[str, Any]) -> None:
    """Add an entry to this process's tables, whether or not it could be written to a file."""
    _table(device).add(entry)
    _found.clear()
    tables_changed()


def entries_of(device: torch.device) -> Entries:
    """Return all entries of a device, by the keys' text."""
    return _table(device).entries


def winner(op: str, arguments: tuple[Any, ...], problem: Problem) -> Found | None:
    """Return the winner of a call of an op's function, or None if no entry serves the call.

    An entry does not count where `problem` says why its backend cannot be had here.
    """
    if torch.compiler.is_compiling():
        return _winner_while_compiling(op, arguments, problem)
    device = arguments[0].device
    if not _table(device).entries:
        return None
    call = call_of(op, arguments, setting_of(op, device.type))
    try:
        return _found[call]
    except KeyError:
        found = _find(call, _table(device), problem)
    except TypeError:  # a size that is a symbol, or another argument without a hash
        return None
    if len(_found) >= MOST_CALLS:
        _found.clear()
    _found[call] = found
    return found


def _find(call: tuple[Any, ...], table: Table, problem: Problem) -> Found | None:
    for batch, entry in table.serving(describe(call)):
        winner = Winner(entry["backend"], entry["algorithm"])
        if not (reason := problem(call[0], *winner)):
            return Found(winner, batch, entry.get("why", ""))
        logger.warning("a tuning table names %s for %s, which cannot be used here: %s", winner, call[0], reason)
    return None


def _winner_while_compiling(op: str, arguments: tuple[Any, ...], problem: Problem) -> Found | None:
    """Do the same while torch.compile traces: the graph holds tables as constants, and varying sizes have no entry."""
    from torch.fx.experimental.symbolic_shapes import has_static_value  # slow to import, here imported long since

    kinds = [parameter.kind for parameter in RECORDS[op].parameters]
    read = tuple([None if kind in (CONSTANT, FREE) else each for kind, each in zip(kinds, arguments)])
    for each in read:
        numbers = each.shape if isinstance(each, Tensor) else each if isinstance(each, tuple | list) else (each,)
        if not all(has_static_value(number) for number in numbers if isinstance(number, int | float)):
            return None
    found = _constant(call_of(op, read, None), problem)
    return Found(Winner(*found[:2]), *found[2:]) if found else None


@constant_while_compiling
def _constant(call: tuple[Any, ...], problem: Problem) -> tuple[str, str | None, int | None, str] | None:
    op, device, *others, _ = call
    call = (op, device, *others, setting_of(op, device.type))
    found = _find(call, _table(device), problem)
    if found is None:
        if device.type == "cuda":
            why = "nothing is tried while torch.compile traces: fastcnn.warm_up(model, input) does so beforehand"
            telling.warn_of_stock(device_name(device), batch_of(describe(call)), why)
        return None
    return *found.winner, found.batch, found.why
