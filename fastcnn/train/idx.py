"""The idx files in which MNIST and Fashion-MNIST are published, checked before use.

Format: a big-endian int32 that says what is inside (0x803 images, 0x801 labels), one int32 per dimension, then bytes.
Source: http://yann.lecun.com/exdb/mnist, section "FILE FORMATS".
"""

import gzip
import math
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastcnn.console.errors import UserError

GZIP_START = b"\x1f\x8b"
NUM_DIMS = {"images": 3, "labels": 1}


@dataclass(frozen=True)
class Labelled:
    """Images with their labels: ``images: (N, H, W)`` uint8, ``labels: (N,)`` int64."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor) -> "Labelled":
        return Labelled(self.images[index], self.labels[index])


def read_pair(directory: Path, split: str, num_classes: int) -> Labelled | None:
    """Read the images and labels of one split, ``train`` or ``t10k``, or return None where neither file is there."""
    images_path, labels_path = (_find(directory, split, kind) for kind in NUM_DIMS)
    if images_path is None and labels_path is None:
        return None
    if images_path is None or labels_path is None:
        missing = "images-idx3" if images_path is None else "labels-idx1"
        raise UserError(f"{directory}: {split}-{missing}-ubyte[.gz] is missing beside the other {split} file")
    images, labels = read_idx(images_path, "images"), read_idx(labels_path, "labels").long()
    if len(images) != len(labels):
        raise UserError(f"{labels_path}: holds {len(labels)} labels, but {images_path.name} holds {len(images)} images")
    if labels.max() >= num_classes:
        place = int((labels >= num_classes).nonzero()[0])
        raise UserError(
            f"{labels_path}: label {int(labels[place])} at position {place} is outside 0 to {num_classes - 1}"
        )
    return Labelled(images, labels)


def _find(directory: Path, split: str, kind: str) -> Path | None:
    names = (f"{split}-{kind}{mark}idx{NUM_DIMS[kind]}-ubyte{end}" for mark in "-." for end in ("", ".gz"))
    return next((directory / name for name in names if (directory / name).is_file()), None)


def read_idx(path: Path, kind: str) -> Tensor:
    """Read an idx file, gzipped or not, of ``images`` or ``labels``: uint8, (N, H, W) or (N,)."""
    data = _read_bytes(path)
    dims = NUM_DIMS[kind]
    header_bytes = 4 + 4 * dims
    if len(data) < header_bytes:
        raise UserError(f"{path}: truncated, {len(data)} bytes are too few for the header of an idx file")
    magic, *shape = struct.unpack(f">{1 + dims}i", data[:header_bytes])
    if magic != 0x800 + dims:
        raise UserError(f"{path}: not an idx file of {kind}, it starts with {magic:#010x} instead of {0x800 + dims:#x}")
    if min(shape) < 1:
        raise UserError(f"{path}: holds no {kind}, its header says {'x'.join(map(str, shape))}")
    expected, found = math.prod(shape), len(data) - header_bytes
    if found != expected:
        wrong = "truncated" if found < expected else "corrupt"
        raise UserError(f"{path}: {wrong}, {'x'.join(map(str, shape))} {kind} need {expected} bytes, {found} are there")
    return torch.frombuffer(bytearray(data), dtype=torch.uint8, offset=header_bytes).reshape(shape)


def _read_bytes(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    if not data:
        raise UserError(f"{path}: the file is empty")
    if not data.startswith(GZIP_START):
        if path.suffix == ".gz":
            raise UserError(f"{path}: corrupt, it does not start like a gzip file")
        return data
    try:
        return gzip.decompress(data)
    except EOFError as error:
        raise UserError(f"{path}: truncated, the gzip data ends early") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}: corrupt gzip data ({error})") from error
