"""Files that are either complete or not there: checkpoints and everything else a run writes."""

import contextlib
import math
import os
import pickle
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch

from fastcnn.train.errors import UserError

FORMAT = "fastcnn-train-2"
FILE_NAME = "checkpoint.pt"
TEMPORARY = ".tmp"
SHARE_OF_TIME = 0.05  # that writing checkpoints may take of training


def atomic_write(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file so that a reader finds the old content or the new, never a part.

    The content goes to a temporary name in the same folder, to the disk (fsync), and is renamed. If ``write`` fails,
    the temporary file is removed and the old one stays. What a killed process leaves is overwritten by the next.

    Args:
        path: the file to write or replace; its folder must exist.
        write: writes the content to the binary file it gets.

    Raises:
        UserError: the disk is full, or writing fails otherwise.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "note.txt")
        >>> atomic_write(path, lambda file: file.write(b"complete"))
        >>> path.read_text()
        'complete'
    """
    temporary = path.with_name(f".{path.name}{TEMPORARY}")
    try:
        with _explained(path), temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:  # Ctrl-C too leaves nothing half-written
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn what the operating system refuses into one line; torch's writer reports it as an error of its own."""
    try:
        yield
    except Exception as error:
        refusal: BaseException | None = error
        while refusal is not None and not isinstance(refusal, OSError):
            refusal = refusal.__cause__ or refusal.__context__
        if refusal is None:
            raise
        kept = "; the one written before it is kept" if path.exists() else ""
        raise UserError(f"{path}: cannot be written ({refusal.strerror or refusal}){kept}") from error


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint: ``state`` holds tensors and plain Python values only, so that it loads with weights_only.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "checkpoint.pt")
        >>> save(path, {"epoch": 3})
        >>> load(path)["epoch"]
        3
    """
    atomic_write(path, lambda file: torch.save({"format": FORMAT, **state}, file))


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU; a folder stands for the checkpoint.pt inside it.

    Raises:
        UserError: there is no such file, or it is not a complete checkpoint of ``fastcnn train``.
    """
    file = locate(path)
    if not file.is_file():
        raise UserError(f"{file}: no such checkpoint")
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError, ValueError, KeyError) as error:
        raise UserError(f"{file}: damaged, or not a checkpoint") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise UserError(f"{file}: not a checkpoint of fastcnn train")
    return state


def locate(path: Path) -> Path:
    """Return the checkpoint that a path means: the file itself, or checkpoint.pt in a folder."""
    return path / FILE_NAME if path.is_dir() else path


class Pace:
    """After which steps a checkpoint is written.

    A resumed run repeats the steps since its checkpoint, with the same losses; so what a kill costs is their time.
    Every ``every`` steps, or with 0 as often as writing takes a twentieth of the time at most: that is counted in
    steps, so that several processes agree.

    Example:
        >>> pace = Pace(every=2)
        >>> [pace.due(steps=1) for step in range(2)]
        [False, True]
    """

    def __init__(self, every: int = 0) -> None:
        self.every = every
        self._interval = self._left = every or 1  # the first one tells how long writing takes
        self._started = time.perf_counter()

    def due(self, steps: int) -> bool:
        """Count steps; return whether it is time."""
        self._left -= steps
        return self._left <= 0

    def next_interval(self, write_seconds: float) -> int:
        """Return after how many steps the next one is due, from how long writing one took just now."""
        if self.every:
            return self.every
        step_seconds = (time.perf_counter() - self._started - write_seconds) / max(1, self._interval - self._left)
        return max(1, math.ceil(write_seconds / (SHARE_OF_TIME * max(step_seconds, 1e-6))))

    def restart(self, interval: int | None = None) -> None:
        """Count from here on to ``interval``, or to the one before."""
        self._interval = self._left = interval or self._interval
        self._started = time.perf_counter()
