"""Result files: one JSON object a line, a run's surroundings and then its rows, appended as they are measured."""

import contextlib
import datetime
import hashlib
import json
import math
import os
import platform
import secrets
import subprocess
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import fastcnn
from benchmarks.cells import Cell
from benchmarks.rows import ROW_KEY, SURROUNDINGS
from fastcnn.console.environment import hardware
from fastcnn.tuning.device import device_name
from fastcnn.tuning.table import load

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def folder_name(device: torch.device) -> str:
    """Return `cpu`, or the GPU's name as a folder: `h200`."""
    if device.type == "cpu":
        return "cpu"
    return torch.cuda.get_device_name(device).removeprefix("NVIDIA ").lower().replace(" ", "-")


def surroundings(device: torch.device) -> dict[str, Any]:
    """Return what times depend on, but for the ceilings."""
    machine, gpu = hardware(), device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if gpu else machine["CPU"],
        "driver": machine["NVIDIA driver"] if gpu else None,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": torch.version.cuda if gpu else None,
        "fastcnn": fastcnn.__version__,
        "commit": commit(),
        "tuning": _tuning(device),
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "tf32": "tf32" if gpu else "ieee",
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _tuning(device: torch.device) -> str | None:
    """Return a digest of the tables that `auto` reads, None where they are empty."""
    entries = load(device_name(device))
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()[:8] if entries else None


def commit() -> str:
    """Return the commit; where it does not tell the sources (changes, or no git at all), a digest of them too."""
    head, changes = _git("rev-parse", "--short=12", "HEAD"), _git("status", "--porcelain", "--", *SOURCES)
    if head and not changes:
        return head
    return f"{head or os.environ.get('FASTCNN_COMMIT', 'unknown')}-{_digest()}"


SOURCES = ("fastcnn", "csrc", "benchmarks/*.py", ":!benchmarks/report")


def _git(*arguments: str) -> str:
    try:
        answer = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return answer.stdout.strip()


def _digest() -> str:
    files = [ROOT.glob("fastcnn/**/*.py"), ROOT.glob("fastcnn/**/*.json"), ROOT.glob("csrc/**/*.*")]
    text = hashlib.sha256()
    for file in sorted(path for found in (*files, ROOT.glob("benchmarks/*.py")) for path in found):
        text.update(file.read_bytes())
    return text.hexdigest()[:8]


class Results:
    """The files of one device; a run adds to them and skips what they hold.

    A note beside a file names the row under way; where a run finds one, its row ended the run before.

    Attributes:
        rows: of this run and of earlier ones with the same surroundings, the latest of each key.
    """

    def __init__(self, folder: Path, current: dict[str, Any], groups: Iterable[str]) -> None:
        self.folder = folder
        self.current = current
        moment = datetime.datetime.now(datetime.UTC)
        self.run = f"{moment:%Y-%m-%dT%H:%M:%SZ}-{secrets.token_hex(2)}"
        self.rows: dict[tuple[str, ...], dict[str, Any]] = {}
        self._began: set[str] = set()
        self.ceilings: dict[str, float] = {}
        for group in groups:
            self._read(group)

    def _read(self, group: str) -> None:
        runs: set[str] = set()
        for line in lines(self.folder / f"{group}.jsonl"):
            if line["kind"] == "run" and all(line[key] == self.current[key] for key in SURROUNDINGS):
                runs.add(line["id"])
            elif line["kind"] == "row" and line["run"] in runs:
                self.rows[(group, *(line[key] for key in ROW_KEY))] = line
        note = self._note(group)
        if note.exists():
            row = json.loads(note.read_text())
            note.unlink()
            if row["run"] in runs:
                self._put(row)

    def _note(self, group: str) -> Path:
        return self.folder / f"{group}.under-way"

    @contextlib.contextmanager
    def under_way(self, group: str, cell: Cell, outcome: dict[str, Any]) -> Iterator[None]:
        """Have a note while the block measures a row, with the outcome that it has if the process ends there."""
        self._begin(group)
        note = self._note(group)
        note.write_text(json.dumps(self._row(group, cell, outcome)))
        try:
            yield
        finally:
            note.unlink()

    def has(self, group: str, cell: Cell) -> bool:
        """Whether a row of the cell and method is there, be it an error."""
        return (group, *_names(cell).values()) in self.rows

    def add(self, group: str, cell: Cell, outcome: dict[str, Any]) -> None:
        """Append a row, and before a file's first one the run; a longer time than the file's is left out."""
        earlier = self.rows.get((group, *_names(cell).values()))
        if earlier and _median(earlier) <= _median(outcome) < math.inf:
            return
        self._begin(group)
        self._put(self._row(group, cell, outcome))

    def _begin(self, group: str) -> None:
        if group not in self._began:
            self._began.add(group)
            self._append(group, {"kind": "run", "id": self.run, **self.current, "ceilings": self.ceilings})

    def _row(self, group: str, cell: Cell, outcome: dict[str, Any]) -> dict[str, Any]:
        return {"kind": "row", "run": self.run, "group": group, **_names(cell), **outcome}

    def _put(self, row: dict[str, Any]) -> None:
        self.rows[(row["group"], *(row[key] for key in ROW_KEY))] = row
        self._append(row["group"], row)

    def _append(self, group: str, line: dict[str, Any]) -> None:
        path = self.folder / f"{group}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def _median(outcome: dict[str, Any]) -> float:
    return math.inf if outcome["error"] else float(outcome["seconds"]["median"])


def _names(cell: Cell) -> dict[str, str]:
    return {name: getattr(cell, name) for name in ROW_KEY}


def lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a result file; a last line that a killed run left half-written is none."""
    text = path.read_text() if path.exists() else ""
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        temporary = path.with_suffix(".tmp")
        temporary.write_text(whole)
        temporary.replace(path)
    return [json.loads(line) for line in whole.splitlines()]
