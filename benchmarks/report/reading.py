"""Result files: one JSON object a line, checked as it is read; a line that is not as expected is skipped and told."""

import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple

from benchmarks.rows import FIELDS, QUANTILES, SURROUNDINGS, Kinds, Row, Run, Seconds


class Problem(NamedTuple):
    """A line that was skipped, and why."""

    path: Path
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.reason}"


class CallCosts(NamedTuple):
    """What `benchmarks.call_cost` wrote: microseconds of thread CPU time a call, on tiny tensors."""

    torch: str
    python: str
    rows: list[dict[str, Any]]


class Results(NamedTuple):
    """What files hold: rows in their order, the lines that were skipped, and what calls cost."""

    rows: list[Row]
    problems: list[Problem]
    call_costs: list[CallCosts]


class ReportError(Exception):
    """What the user must mend, in one line."""


class _Unreadable(ValueError):
    """Why a line is skipped."""


def read(places: Iterable[Path]) -> Results:
    """Read result files, and those in folders (`*.jsonl` and `call_cost.json`, at any depth).

    Raises:
        ReportError: a place is not there or cannot be read.

    Example:
        >>> read([]).rows
        []
    """
    results = Results([], [], [])
    for path in dict.fromkeys(found for place in places for found in _files(place)):
        (_read_call_costs if path.suffix == ".json" else _read_file)(path, results)
    return results


def _files(place: Path) -> list[Path]:
    if not place.exists():
        raise ReportError(f"{place}: no such file or folder of benchmark results")
    return sorted([*place.rglob("*.jsonl"), *place.rglob("call_cost.json")]) if place.is_dir() else [place]


def _read_call_costs(path: Path, results: Results) -> None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        for row in found["rows"]:
            if not all(isinstance(row[name], str) for name in ("what", "backend", "mode")):
                raise _Unreadable(f"what, backend, mode: expected text, got {_short(row)}")
            for name in ("stock", "front", "python"):
                _positive(name, row[name])
        results.call_costs.append(CallCosts(str(found["torch"]), str(found["python"]), found["rows"]))
    except OSError as error:
        raise ReportError(f"{path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        results.problems.append(Problem(path, 1, f"{type(error).__name__}: {error}"))


def _read_file(path: Path, results: Results) -> None:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ReportError(f"{path}: {error.strerror}") from error
    runs: dict[str, Run] = {}
    for number, text in enumerate(content.split(b"\n"), start=1):
        if not text.strip():
            continue
        try:
            results.rows.extend(_parse(text, runs))
        except _Unreadable as problem:
            results.problems.append(Problem(path, number, str(problem)))


def _parse(text: bytes, runs: dict[str, Run]) -> Iterator[Row]:
    """Give the row of a line; of one that opens a run give nothing, and note the run."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _Unreadable(f"not JSON: {error}") from error
    kind = line.get("kind") if isinstance(line, dict) else line
    if not isinstance(kind, str) or kind not in FIELDS:
        raise _Unreadable(f"kind: expected 'run' or 'row', got {_short(kind)}")
    _check(line, FIELDS[kind])
    if kind == "run":
        ceilings = tuple((name, _positive(f"ceilings.{name}", value)) for name, value in line["ceilings"].items())
        runs[line["id"]] = Run(line["id"], tuple((name, line[name]) for name in SURROUNDINGS), ceilings)
    elif line["run"] in runs:
        yield _row(line, runs[line["run"]])
    else:
        raise _Unreadable(f"run: expected one that this file opens, got {_short(line['run'])}")


def _check(line: dict[str, Any], fields: Kinds) -> None:
    for name, kinds in fields.items():
        if name not in line:
            raise _Unreadable(f"{name}: expected in a {line['kind']!r} line, got none")
        if not isinstance(line[name], kinds) or isinstance(line[name], bool):
            expected = " or ".join("null" if kind is NoneType else kind.__name__ for kind in kinds)
            raise _Unreadable(f"{name}: expected {expected}, got {_short(line[name])}")


def _row(line: dict[str, Any], run: Run) -> Row:
    if (line["seconds"] is None) == (line["error"] is None):
        raise _Unreadable("seconds, error: expected one of them, got " + ("none" if line["error"] is None else "both"))
    values = {name: line[name] for name in Row._fields if name in line}
    if line["seconds"] is not None:
        times = [_positive(f"seconds.{name}", line["seconds"].get(name)) for name in QUANTILES]
        if times != sorted(times):
            raise _Unreadable(f"seconds: expected p20 <= median <= p80, got {_short(line['seconds'])}")
        values["seconds"] = Seconds(*times)
    if line["floor_seconds"] is not None:
        _positive("floor_seconds", line["floor_seconds"])
    if line["peak_bytes"]:  # a call may take none
        _positive("peak_bytes", line["peak_bytes"])
    return Row(**{**values, "run": run})


def _positive(name: str, value: object) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not (math.isfinite(value) and value > 0):
        raise _Unreadable(f"{name}: expected a positive number, got {_short(value)}")
    return float(value)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
