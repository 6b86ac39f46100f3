"""Checkpoints of ``fastcnn train``, which ``fastcnn predict`` reads too."""

import pickle
from pathlib import Path
from typing import Any

import torch

from fastcnn.console.errors import OptionError, UserError
from fastcnn.console.files import atomic_write

FORMAT = "fastcnn-train-2"
FILE_NAME = "checkpoint.pt"


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

    Raises UserError where there is no such file, or it is not a complete checkpoint of ``fastcnn train``.
    """
    file = locate(path)
    if not file.is_file():
        raise OptionError(f"{file}: no such checkpoint")
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
