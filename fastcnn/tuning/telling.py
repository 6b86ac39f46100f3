"""What a user sees of trials, on standard error: that trials run, and their results in one line."""

import atexit
import contextlib
import logging
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

logger = logging.getLogger("fastcnn")

PATIENCE = 2.0  # seconds until something is said of what is under way
QUIET = 1.0  # seconds without a trial, or as long as the trials took, after which they are summed up


class _Told:
    """The trials since the last summary, and what has been said."""

    def __init__(self) -> None:
        self.stages = self.faster = 0
        self.seconds = 0.0
        self.where, self.path = "", Path()
        self.timer: threading.Timer | None = None
        self.said: set[str] = set()


_told = _Told()
_lock = threading.RLock()


def _is_first(what: str) -> bool:
    """Whether something has not been said before; it counts as said from now on."""
    with _lock:
        new = what not in _told.said
        _told.said.add(what)
        return new


def once(message: str) -> None:
    """Write a line, once a process; of the processes of one training (DDP) the first one of a machine alone does."""
    if _is_first(message) and os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"fastcnn: {message}", file=sys.stderr, flush=True)


def _after(seconds: float, run: Callable[..., None], *arguments: str) -> threading.Timer:
    timer = threading.Timer(seconds, run, arguments)
    timer.daemon = True
    timer.start()
    return timer


@contextlib.contextmanager
def under_way(what: str, *, counts: bool = True) -> Iterator[None]:
    """Say what is done where it takes long, and count its time as that of trials."""
    with _lock:
        _stop()
        left = max(PATIENCE - _told.seconds, 0.01) if counts else PATIENCE
    timer = _after(left, once, f"{what} (FASTCNN_TRIAL=0 turns that off)")
    begin = time.perf_counter()
    try:
        yield
    finally:
        timer.cancel()
        with _lock:
            _told.seconds += (time.perf_counter() - begin) * counts


def tried(where: str, path: Path, *, faster: bool) -> None:
    """Count a stage that was tried; some time after the last one they are summed up."""
    with _lock:
        _told.stages += 1
        _told.faster += faster
        _told.where, _told.path = where, path
        _stop()
        _told.timer = _after(max(QUIET, _told.seconds), sum_up)


def _stop() -> None:
    if _told.timer:
        _told.timer.cancel()
        _told.timer = None


@atexit.register
def sum_up() -> None:
    """Say what trials have found: visibly the first time, then in the log."""
    with _lock:
        _stop()
        if not _told.stages:
            return
        stages = f"{_told.stages} stage{'s' if _told.stages > 1 else ''}"
        line = (
            f"tried {stages} on {_told.where} in {_told.seconds:.1f} s, "
            f"{_told.faster} run{'s' if _told.faster == 1 else ''} faster than stock; kept in {_told.path}"
        )
        _told.stages = _told.faster = 0
        _told.seconds = 0.0
    say = once if _is_first("summary") else logger.info
    say(line)


# Returns the model that a command would tune, where it is known: fastcnn.models knows what was built.
model_name: Callable[[], str] = str


def warn_of_stock(device: str, batch: int, why: str) -> None:
    """Warn, once a process, that a GPU runs the stock layers, and give the command that changes that."""
    if _is_first("stock"):
        command = f"fastcnn tune {model_name() or 'MODEL'} --batch-size {batch or 'N'}"
        warnings.warn(
            f"fastcnn runs stock layers on {device}: no table has these shapes ({why}). To change that: {command} "
            "(add --dtype bfloat16 --channels-last if the model runs so)",
            stacklevel=2,
        )


def forget() -> None:
    """Begin anew, as a process does: for tests."""
    global _told
    with _lock:
        _stop()
        _told = _Told()
