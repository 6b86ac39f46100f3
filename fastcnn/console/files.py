"""Files that are either complete or not there."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from fastcnn.console.errors import UserError
from fastcnn.tuning.table import TEMPORARY, cache_folder, replace

__all__ = ["TEMPORARY", "atomic_write", "cache_folder"]


def atomic_write(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file so that a reader finds the old content or the new, never a part.

    The content goes to a temporary name in the same folder, to the disk (fsync), and is renamed. If ``write`` fails,
    the temporary file is removed and the old one stays; an error of the operating system becomes a UserError. What a
    killed process leaves is overwritten by the next.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "note.txt")
        >>> atomic_write(path, lambda file: file.write(b"complete"))
        >>> path.read_text()
        'complete'
    """

    def write_to_disk(file: BinaryIO) -> None:
        write(file)
        file.flush()
        os.fsync(file.fileno())

    try:
        replace(path, write_to_disk)
    except Exception as error:
        refusal: BaseException | None = error  # torch's writer raises its own error class for one of the system
        while refusal is not None and not isinstance(refusal, OSError):
            refusal = refusal.__cause__ or refusal.__context__
        if refusal is None:
            raise
        kept = "; the one written before it is kept" if path.exists() else ""
        raise UserError(f"{path}: cannot be written ({refusal.strerror or refusal}){kept}") from error
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
