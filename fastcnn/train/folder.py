"""Images in one folder per class, through torchvision; all are read once before the first step."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from fastcnn.console.errors import UserError, require, said
from fastcnn.console.files import atomic_write, cache_folder
from fastcnn.console.images import STATISTICS, open_image, transforms
from fastcnn.console.models import abridged
from fastcnn.train.data import Batch, Dataset, Draws, Feed, epoch_order, stratified_split

if TYPE_CHECKING:
    from fastcnn.train.image_folder import ImageFolder

SEED_RANGE = 2**62


class _Images(TorchDataset[Tensor | UserError]):
    """Batches of images whose random crops depend on seed, epoch and image alone, not on who loads them.

    An unreadable image makes an error as a value: a DataLoader process would wrap a raised one in a traceback.
    """

    def __init__(self, folder: ImageFolder, transform: Callable[[Any], Tensor], feed: Feed, epoch: int) -> None:
        self.folder, self.transform, self.feed, self.epoch = folder, transform, feed, epoch

    def __getitem__(self, indices: list[int]) -> Tensor | UserError:
        images = torch.empty(len(indices), *self.feed.input_size, dtype=torch.uint8)
        for place, index in enumerate(indices):
            path, _ = self.folder.samples[index]
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(hash((self.feed.seed, self.epoch, index)) % SEED_RANGE)
                try:
                    images[place] = self.transform(self.folder.loader(path))
                except Exception as error:  # PIL raises many kinds for damaged files, and each must name its file
                    return UserError(f"{path}: not an image that can be read ({said(error)})")
        return images


def _leave_ctrl_c_to_parent(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class FolderData(Dataset):
    """Images by class: ``DIR/train`` and ``DIR/val`` (or valid, validation, test), or a fifth is held out.

    All are resized so that the shorter side is an eighth longer than the network's input (256 for 224 and 227).
    Training images then get a random crop and flip, held-out ones the centre crop. They come to the device as bytes;
    the network normalizes them, with ImageNet's mean and standard deviation. ``console`` shows the progress of checking
    that all images can be read.
    """

    gives_bytes = True

    def __init__(
        self, directory: Path, feed: Feed, *, skip_broken: bool = False, console: Console | None = None
    ) -> None:
        require("train", "torchvision")
        from fastcnn.train.image_folder import open_folders  # torchvision takes a second to import

        self.feed = feed
        channels = feed.input_size[0]
        if channels not in STATISTICS:
            raise UserError(f"images have 3 channels, or 1 when turned to grey; the network's input has {channels}")
        self.statistics = STATISTICS[channels]
        self._train, held_out = open_folders(directory)
        self._test = held_out or self._train
        self.classes: tuple[str, ...] = tuple(self._train.classes)
        parts = [self._train, held_out] if held_out else [self._train]
        broken = self._leave_out_broken(directory, parts, skip_broken, console or Console(quiet=True))
        labels = torch.tensor(self._train.targets)
        if held_out:
            self._train_index, self._test_index = torch.arange(len(labels)), torch.arange(len(held_out))
        else:
            self._train_index, self._test_index = stratified_split(labels)
        self.train_size, self.test_size = len(self._train_index), len(self._test_index)
        if not self.test_size:
            raise UserError(f"{directory}: too few images to hold out a fifth of each class ({self.train_size} in all)")
        origin = f"of {Path(self._test.root).name}/" if held_out else "a fifth of each class"
        notes = [
            f"data: {directory}, {self.train_size:,} training and {self.test_size:,} held-out images ({origin})",
            f"{len(self.classes):,} classes: {abridged(self.classes)}",
        ]
        if skipped := sum((part.skipped for part in parts), Counter()):
            kinds = ", ".join(f"{count:,} {suffix or 'without suffix'}" for suffix, count in skipped.most_common())
            files = "file that is" if skipped.total() == 1 else "files that are"
            notes.append(f"skipped {skipped.total():,} {files} not read as images: {kinds}")
        self.notes: tuple[str, ...] = (*notes, *([broken] if broken else ()))
        self._train_transform, self._test_transform = transforms(feed.input_size)

    def _leave_out_broken(self, directory: Path, parts: list[ImageFolder], skip_broken: bool, console: Console) -> str:
        """Read every image once; leave out those that cannot be read and say so, or raise. Processes share the work."""
        world = self.feed.world
        files = sorted(path for part in parts for path, _ in part.samples)
        mine = unreadable(files[world.rank :: world.size], directory, self.feed.workers, console)
        found = {path: reason for each in world.gather(mine) for path, reason in each.items()}
        if not found:
            return ""
        names = sorted(found)
        if not skip_broken:
            others = f"; and {len(found) - 1:,} more: {abridged(names[1:])}" if len(found) > 1 else ""
            raise UserError(
                f"{names[0]}: not an image that can be read ({found[names[0]]}){others}; mend or delete broken "
                "images, or leave them out by --skip-broken"
            )
        for part in parts:
            part.samples = [sample for sample in part.samples if sample[0] not in found]
            part.targets = [label for _, label in part.samples]
            if empty := sorted({*part.classes} - {part.classes[label] for label in part.targets}):
                raise UserError(f"{part.root}: no readable image of the classes {abridged(empty)}")
        return f"left out {len(found):,} images that cannot be read: {abridged(names)}"

    def train_draws(self, epoch: int, first_step: int = 0, steps: int = 1) -> Iterator[Draws]:
        """Yield images (1, n, C, H, W) uint8, this process's, and labels (1, N) int64, one step at a time."""
        order = self._train_index[epoch_order(self.train_size, self.feed.seed, epoch)]
        images = _Images(self._train, self._train_transform, self.feed, epoch)
        return self._load(images, order[first_step * self.feed.batch_size :])

    def test_draws(self, steps: int = 1) -> Iterator[Draws]:
        """Yield held-out images and their labels, in the same form."""
        return self._load(_Images(self._test, self._test_transform, self.feed, 0), self._test_index)

    def batch(self, *draw: Tensor) -> Batch:
        """Return what was drawn."""
        pixels, labels = draw
        return pixels, labels

    def _load(self, images: _Images, order: Tensor) -> Iterator[Draws]:
        device, world = self.feed.device, self.feed.world
        batches = [index for index in order.split(self.feed.batch_size) if len(index)]
        loader = DataLoader(
            images,
            batch_size=None,  # an item is a batch
            sampler=[index[world.share(len(index))].tolist() for index in batches],
            num_workers=self.feed.workers,
            worker_init_fn=_leave_ctrl_c_to_parent,
            pin_memory=device.type == "cuda",
            generator=torch.Generator().manual_seed(0),  # else it would draw its seed from the networks' stream
        )
        targets = torch.tensor(images.folder.targets)
        for index, pixels in zip(batches, loader):
            if isinstance(pixels, UserError):
                raise pixels
            labels = targets[index].pin_memory() if device.type == "cuda" else targets[index]
            yield tuple(part.to(device, non_blocking=True).unsqueeze(0) for part in (pixels, labels))


def unreadable(files: Sequence[str], directory: Path, workers: int, console: Console) -> dict[str, str]:
    """Return the images that cannot be read, with the reason of each; ``workers`` threads decode.

    Readable ones are remembered per data set, which is a ``directory``, in the cache folder by path, size and time of
    change, so that the next run checks only new and changed ones.
    """
    memory = cache_folder() / "images" / f"{_digest(str(directory.resolve()))}.txt"
    keys = {file: _key(file, directory) for file in files}
    known = _remembered(memory)
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
            _remember(memory, known)
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


def _remembered(memory: Path) -> set[str]:
    try:
        return {*memory.read_text(encoding="ascii").split()}
    except (OSError, UnicodeDecodeError):
        return set()


def _remember(memory: Path, keys: set[str]) -> None:
    from filelock import FileLock

    with contextlib.suppress(OSError, UserError):  # without a cache folder the next run checks all of them again
        memory.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{memory}.lock"):  # of several processes, each adds what it has checked
            every = sorted(keys | _remembered(memory))
            atomic_write(memory, lambda file: file.write("\n".join(every).encode()))
