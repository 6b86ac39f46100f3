"""Notes of running candidates: one that hangs, crashes or makes the GPU unusable is left out at the next start."""

import atexit
import faulthandler
import fcntl
import hashlib
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import IO

import torch

from fastcnn.tuning.stage import Stage
from fastcnn.tuning.table import Winner

HANGS = 120  # seconds of one candidate on a GPU, its compilation included
STOPS = (signal.SIGTERM, signal.SIGHUP)  # that others send to end a process


class Lost(Exception):
    """A candidate has left the GPU unusable for this process."""


def is_lost(device: torch.device) -> bool:
    """Whether an error has left a GPU unusable for this process."""
    if device.type != "cuda":
        return False
    for _ in range(2):  # a launch that failed may have left its error in the runtime, which the first question clears
        with suppress(RuntimeError):
            torch.cuda.synchronize(device)
            return False
    return True


class Attempts:
    """Notes in a folder beside a table, each there while its candidate runs; a note that is left ended its process.

    A note is locked by the process that wrote it, so that others which try the same at the same time (DDP) do not take
    it for one that was left behind. A process that is told to stop (SIGTERM), or ends by itself while another thread
    runs a candidate, was not ended by that: such a note does not count. Where no file can be written there are none.
    `ends`: a candidate that hangs on a GPU ends the process.
    """

    def __init__(self, table: Path, device: torch.device, *, ends: bool = True) -> None:
        self.folder = table.with_name(f"{table.name}.attempts")
        self._device, self._ends = device, ends and device.type == "cuda"

    def problem(self, stage: Stage, candidate: Winner) -> str:
        """Say that a candidate has ended a process, or return an empty string."""
        for note in self.folder.glob(f"{_name(stage, candidate)}.*.txt"):
            try:
                with note.open(encoding="utf-8") as file:
                    fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                    lines = file.read().splitlines()
            except OSError:  # its process is at it still, or has just ended it
                continue
            if len(lines) == 1:
                return f"it ended the process that tried it (to try it again, delete {note})"
            note.unlink(missing_ok=True)  # a signal has stopped that process
        return ""

    @contextmanager
    def under_way(self, stage: Stage, candidate: Winner) -> Iterator[None]:
        """Have a note while the block runs, which stays if the process ends there.

        Raises Lost where the block has raised, and so does everything on this GPU from now on.
        """
        note = self.folder / f"{_name(stage, candidate)}.{os.getpid()}.txt"
        file = _written(note, f"{stage.op} {stage}: {candidate}\n")
        if self._ends:
            faulthandler.dump_traceback_later(HANGS, exit=True)
        lost = False
        try:
            with _noting_stops(note, file) if file else nullcontext():
                yield
        except Exception as error:
            if lost := is_lost(self._device):
                raise Lost(f"{candidate} left the GPU unusable ({error}); the next process leaves it out") from error
            raise
        finally:
            if self._ends:
                faulthandler.cancel_dump_traceback_later()
            if file and not lost:
                note.unlink(missing_ok=True)
            if file:
                file.close()


@contextmanager
def _noting_stops(note: Path, file: IO[str]) -> Iterator[None]:
    """While the block runs, have a signal that stops the process add its traceback to a note, and an exit remove it.

    A handler of faulthandler also runs while a kernel does, which one of Python's would wait for.
    """
    before = {each: signal.getsignal(each) for each in STOPS}
    for each in STOPS:
        faulthandler.register(each, file, all_threads=False, chain=True)
    atexit.register(note.unlink, missing_ok=True)
    try:
        yield
    finally:
        atexit.unregister(note.unlink)
        for each, handler in before.items():
            if signal.getsignal(each) == handler:  # else another thread has set one meanwhile, which stays
                faulthandler.unregister(each)


def _name(stage: Stage, candidate: Winner) -> str:
    operands = {name: (each.shape, str(each.dtype), each.strides) for name, each in stage.tensors.items()}
    what = f"{stage.op} {operands} {stage.settings} {candidate}"
    return hashlib.sha256(what.encode()).hexdigest()[:16]


def _written(note: Path, text: str) -> IO[str] | None:
    """Write a note and lock it, until the file is closed or the process ends; nobody sees it without its lock."""
    unlocked = note.with_suffix(".new")
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        file = unlocked.open("w", encoding="utf-8")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file.write(text)
        file.flush()
        unlocked.replace(note)
    except OSError:
        return None
    return file
