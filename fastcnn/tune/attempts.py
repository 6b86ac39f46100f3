"""Candidates that end the process: one that hangs, crashes or leaves the GPU unusable is known at the next start."""

import faulthandler
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from fastcnn.console.errors import UserError
from fastcnn.tune.stages import Stage
from fastcnn.tuning import Winner

HANGS = 120  # seconds of one candidate on a GPU, its compilation included


class Lost(UserError):
    """A candidate has left the GPU unusable for this process."""


def is_lost(device: torch.device) -> bool:
    """Whether an error has left a GPU unusable for this process.

    Asked twice: a launch that failed may have left its error in the runtime, which the first question clears.

    Example:
        >>> is_lost(torch.device("cpu"))
        False
    """
    return device.type == "cuda" and not (_answers(device) or _answers(device))


def _answers(device: torch.device) -> bool:
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return False
    return True


class Attempts:
    """Notes in a folder beside a table, each there while its candidate runs; what stays behind ended its process.

    Args:
        table: the table that is written; processes may share it if they run different stages.
        device: where candidates run.

    Example:
        >>> Attempts(Path("nvidia-h200.json"), torch.device("cuda")).folder.name
        'nvidia-h200.json.attempts'
    """

    def __init__(self, table: Path, device: torch.device) -> None:
        self.folder = table.with_name(f"{table.name}.attempts")
        self._device = device

    def problem(self, stage: Stage, candidate: Winner) -> str:
        """Say that a candidate has ended a process, or return an empty string."""
        note = self._note(stage, candidate)
        return f"it ended the process that tried it (to try it again, delete {note})" if note.exists() else ""

    @contextmanager
    def under_way(self, stage: Stage, candidate: Winner) -> Iterator[None]:
        """Have a note while the block runs, which stays if the process ends there.

        Raises:
            Lost: the block has raised, and so does everything on this GPU from now on.
        """
        note = self._note(stage, candidate)
        self.folder.mkdir(parents=True, exist_ok=True)
        note.write_text(f"{stage.op} {stage}: {candidate}\n", encoding="utf-8")
        if self._device.type == "cuda":
            faulthandler.dump_traceback_later(HANGS, exit=True)
        lost = False
        try:
            yield
        except Exception as error:
            lost = is_lost(self._device)
            if lost:
                raise Lost(f"{candidate} left the GPU unusable ({error}): go on without it by --resume") from error
            raise
        finally:
            faulthandler.cancel_dump_traceback_later()
            if not lost:
                note.unlink()

    def _note(self, stage: Stage, candidate: Winner) -> Path:
        operands = {name: (each.shape, str(each.dtype), each.strides) for name, each in stage.tensors.items()}
        what = f"{stage.op} {operands} {stage.settings} {candidate}"
        return self.folder / f"{hashlib.sha256(what.encode()).hexdigest()[:16]}.txt"
