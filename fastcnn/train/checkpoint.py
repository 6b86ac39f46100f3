"""Files that are either complete or not there: checkpoints and everything else a run writes."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch

from fastcnn.train.errors import UserError

FORMAT = "fastcnn-train-1"
FILE_NAME = "checkpoint.pt"


def atomic_write(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file so that a reader finds the old content or the new, never a part.

    The content goes to a temporary name in the same folder, to the disk (fsync), and is renamed. If ``write`` fails,
    the temporary file is removed and the old one stays.

    Args:
        path: the file to write or replace; its folder must exist.
        write: writes the content to the binary file it gets.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "note.txt")
        >>> atomic_write(path, lambda file: file.write(b"complete"))
        >>> path.read_text()
        'complete'
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:  # Ctrl-C too leaves nothing half-written
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


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
