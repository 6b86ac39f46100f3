"""Reading and writing the table of one device."""

import json
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from fastcnn.tuning.call import text
from fastcnn.tuning.device import file_name

logger = logging.getLogger("fastcnn")

FORMAT = 1
TEMPORARY = ".tmp"  # the suffix of a file that is being written
LOCK_SECONDS = 60  # after which a lock that nobody holds that long is one that the file system does not have
Entries = dict[str, dict[str, Any]]  # by their keys' text


class Winner(NamedTuple):
    """What runs a call: a backend, and its algorithm where it has several."""

    backend: str
    algorithm: str | None

    def __str__(self) -> str:
        return self.backend if self.algorithm is None else f"{self.backend} {self.algorithm}"


class Unreadable(Exception):
    """A file is not a table of this device; the message says why."""


def shipped_path(device: str) -> Path:
    """Return where the package has the table of a device, if it was measured."""
    return Path(__file__).parent / file_name(device)


def cache_folder() -> Path:
    """Return the folder of what fastcnn remembers about this machine: $FASTCNN_CACHE, or fastcnn/ in ~/.cache."""
    cache = os.environ.get("FASTCNN_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "fastcnn"
    return Path(cache).expanduser()


def user_path(device: str) -> Path:
    """Return where the user's table of a device is, or will be."""
    return cache_folder() / "tuning" / file_name(device)


def read(path: Path, device: str) -> Entries:
    """Return the entries of a file, none where there is none; raise Unreadable for what is no table of this device."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        raise Unreadable(f"it cannot be read ({error})") from error
    if not isinstance(table, dict) or table.get("format") != FORMAT:
        raise Unreadable(f"it is not a table of format {FORMAT}")
    if table.get("device") != device:
        raise Unreadable(f"it is the table of {table.get('device')!r}, not of {device!r}")
    entries = table.get("entries")
    if not isinstance(entries, list) or not all(map(_is_entry, entries)):
        raise Unreadable("an entry lacks a key or a backend")
    return {text(entry["key"]): entry for entry in entries}


def _is_entry(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("backend"), str)
        and isinstance(entry.get("algorithm"), str | None)
        and isinstance(key := entry.get("key"), dict)
        and isinstance(key.get("op"), str)
        and all(isinstance(key.get(name, []), list) for name in ("input", "other", "weight"))
        and "input" in key
    )


def load(device: str) -> Entries:
    """Return the entries of a device: the shipped ones, then the user's; log a file that is not a table."""
    known: Entries = {}
    for path in (shipped_path(device), user_path(device)):
        try:
            known |= read(path, device)
        except Unreadable as reason:
            logger.warning("tuning table %s is ignored: %s", path, reason)
    return known


def holds(path: Path, device: str, key: dict[str, Any], by: str) -> bool:
    """Whether a file has an entry with this key that was measured by ``tune``, or by a ``trial``, which times less."""
    try:
        return read(path, device).get(text(key), {"by": ""}).get("by", "tune") == by
    except Unreadable:
        return False


def merge(path: Path, device: str, entries: list[dict[str, Any]]) -> None:
    """Add entries to a file, in place of those with the same keys; others stay, whoever wrote them and when.

    Processes may do so at once: each holds a lock from reading to renaming. Readers need none. Raises OSError where the
    file cannot be written or locked.
    """
    from filelock import FileLock

    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock", timeout=LOCK_SECONDS):
        try:
            held = read(path, device)
        except Unreadable as reason:
            held, aside = {}, path.with_name(f"{path.name}.{time.time_ns()}.unreadable")
            path.rename(aside)
            logger.warning("tuning table %s has been moved to %s: %s", path, aside.name, reason)
        held |= {text(entry["key"]): entry for entry in entries}
        lines = ",\n".join(json.dumps(held[key]) for key in sorted(held))
        whole = f'{{"format": {FORMAT}, "device": {json.dumps(device)}, "entries": [\n{lines}\n]}}\n'
        replace(path, lambda file: file.write(whole.encode()))


def replace(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file whole or not at all: readers see the old or the new one. Of several writers each holds a lock."""
    temporary = path.with_name(f".{path.name}{TEMPORARY}")
    try:
        with temporary.open("wb") as file:
            write(file)
        temporary.replace(path)
    except BaseException:  # Ctrl-C too leaves nothing half-written
        temporary.unlink(missing_ok=True)
        raise
