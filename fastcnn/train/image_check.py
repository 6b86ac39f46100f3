"""Checks that all images can be read, before the first step, in parallel, and remembers the result."""

import contextlib
import hashlib
import os
from collections.abc import Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fastcnn.console.errors import UserError, said
from fastcnn.console.files import atomic_write, cache_folder
from fastcnn.console.images import open_image


def unreadable(files: Sequence[str], directory: Path, workers: int, console: Console) -> dict[str, str]:
    """Return the images that cannot be read, with the reason of each; ``workers`` threads decode.

    Readable ones are remembered per data set, which is a ``directory``, in the cache folder by path, size and time of
    change, so that the next run checks only new and changed ones.
    """
    memory = cache_folder() / "images" / f"{_digest(str(directory.resolve()))}.txt"
    keys = {file: _key(file, directory) for file in files}
    known = _read(memory)
    new = [file for file, key in keys.items() if key not in known]
    found: dict[str, str] = {}
    columns = (TextColumn("checking images"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    try:
        with ThreadPool(max(1, workers)) as pool, progress:  # PIL decodes without holding the interpreter
            reasons = pool.imap(_reason, new, chunksize=16)
            for file, reason in zip(new, progress.track(reasons, total=len(new)), strict=True):
                if reason:
                    found[file] = reason
                else:
                    known.add(keys[file])
    finally:
        if new:
            _write(memory, known)
    return found


def _reason(file: str) -> str:
    try:
        open_image(file, small=True)
    except Exception as error:  # PIL raises many kinds for damaged files
        return said(error)
    return ""


def _key(file: str, directory: Path) -> str:
    with contextlib.suppress(OSError):
        status = os.stat(file)
        return _digest(f"{os.path.relpath(file, directory)}\0{status.st_size}\0{status.st_mtime_ns}")
    return ""


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(errors="surrogateescape"), digest_size=8).hexdigest()


def _read(memory: Path) -> set[str]:
    try:
        return {*memory.read_text(encoding="ascii").split()}
    except (OSError, UnicodeDecodeError):
        return set()


def _write(memory: Path, keys: set[str]) -> None:
    from filelock import FileLock

    with contextlib.suppress(OSError, UserError):  # without a cache folder the next run checks all of them again
        memory.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{memory}.lock"):  # of several processes, each adds what it has checked
            every = sorted(keys | _read(memory))
            atomic_write(memory, lambda file: file.write("\n".join(every).encode()))
