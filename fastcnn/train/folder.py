"""Images in one folder per class, through torchvision."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from fastcnn.train.data import Batch, Dataset, Draws, Feed, epoch_order, stratified_split
from fastcnn.train.errors import UserError, require

if TYPE_CHECKING:
    from torchvision.datasets import ImageFolder

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
SEED_RANGE = 2**62


@dataclass(frozen=True)
class Broken:
    """An image that cannot be read. It travels as a value, as a DataLoader process would wrap an exception's text."""

    path: str
    reason: str


class _Images(TorchDataset[tuple[Tensor, int] | Broken]):
    """Images whose random crop depends on seed, epoch and image alone, not on who loads them or what came before."""

    def __init__(self, folder: ImageFolder, transform: Callable[[Any], Tensor], seed: int, epoch: int) -> None:
        self.folder, self.transform, self.seed, self.epoch = folder, transform, seed, epoch

    def __getitem__(self, index: int) -> tuple[Tensor, int] | Broken:
        path, label = self.folder.samples[index]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(hash((self.seed, self.epoch, index)) % SEED_RANGE)
            try:
                return self.transform(self.folder.loader(path)), label
            except (OSError, SyntaxError, ValueError) as error:  # what PIL raises for damaged files
                return Broken(path, " ".join(str(error).split()) or type(error).__name__)


def _collate(samples: list[tuple[Tensor, int] | Broken]) -> Batch | Broken:
    for sample in samples:
        if isinstance(sample, Broken):
            return sample
    images, labels = zip(*samples)
    return torch.stack(images), torch.tensor(labels)


def _leave_ctrl_c_to_parent(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class FolderData(Dataset):
    """Images by class: ``DIR/train`` and ``DIR/val``, or one folder of which a fifth is held out.

    Training images get a random resized crop and flip, held-out ones a resize and centre crop; all are normalised
    with ImageNet's mean and standard deviation.

    Args:
        directory: the folder.
        feed: how batches are cut; ``feed.workers`` processes decode the images.

    Raises:
        UserError: no class folders, a class without images, classes that differ between train and val.

    Example:
        >>> data = FolderData(Path("flowers"), Feed((3, 224, 224), batch_size=64, workers=8))  # doctest: +SKIP
    """

    def __init__(self, directory: Path, feed: Feed) -> None:
        require("train", "torchvision")
        self.feed = feed
        has_split = (directory / "train").is_dir() and (directory / "val").is_dir()
        train_dir, test_dir = (directory / "train", directory / "val") if has_split else (directory, directory)
        self._train, self._test = _open(train_dir), _open(test_dir)
        if self._train.classes != self._test.classes:
            differ = sorted(set(self._train.classes) ^ set(self._test.classes))
            raise UserError(f"{directory}: train and val differ in classes: {', '.join(differ)}")
        labels = torch.tensor(self._train.targets)
        if has_split:
            self._train_index, self._test_index = torch.arange(len(labels)), torch.arange(len(self._test))
        else:
            self._train_index, self._test_index = stratified_split(labels)
        self.classes: tuple[str, ...] = tuple(self._train.classes)
        self.train_size, self.test_size = len(self._train_index), len(self._test_index)
        if not self.test_size:
            raise UserError(f"{directory}: too few images to hold out a fifth of each class ({self.train_size} in all)")
        note = f"data: {directory}, {self.train_size} training and {self.test_size} held-out images"
        self.notes: tuple[str, ...] = (note if has_split else f"{note} (a fifth of each class)",)
        self._train_transform, self._test_transform = _transforms(feed.input_size)

    def train_draws(self, epoch: int, first_step: int = 0, steps: int = 1) -> Iterator[Draws]:
        """Yield the batches themselves, one step at a time: images (1, N, C, H, W) float32, labels (1, N) int64."""
        order = self._train_index[epoch_order(self.train_size, self.feed.seed, epoch)]
        images = _Images(self._train, self._train_transform, self.feed.seed, epoch)
        return self._load(images, order[first_step * self.feed.batch_size :])

    def test_draws(self, steps: int = 1) -> Iterator[Draws]:
        """Yield the batches themselves, one step at a time."""
        return self._load(_Images(self._test, self._test_transform, self.feed.seed, 0), self._test_index)

    def batch(self, *draw: Tensor) -> Batch:
        """Return the batch that was drawn."""
        images, labels = draw
        return images, labels

    def _load(self, images: _Images, order: Tensor) -> Iterator[Draws]:
        device = self.feed.device
        loader = DataLoader(
            images,
            batch_sampler=[index.tolist() for index in order.split(self.feed.batch_size) if len(index)],
            num_workers=self.feed.workers,
            collate_fn=_collate,
            worker_init_fn=_leave_ctrl_c_to_parent,
            pin_memory=device.type == "cuda",
            generator=torch.Generator().manual_seed(0),  # the loader's own seed must not draw from the networks' stream
        )
        for batch in loader:
            if isinstance(batch, Broken):
                raise UserError(f"{batch.path}: not an image that can be read ({batch.reason})")
            pixels, labels = batch
            yield tuple(part.to(device, non_blocking=True).unsqueeze(0) for part in (pixels, labels))


def _open(directory: Path) -> ImageFolder:
    from torchvision.datasets import ImageFolder

    if not directory.is_dir():
        raise UserError(f"{directory}: no such folder")
    try:
        return ImageFolder(str(directory))
    except FileNotFoundError as error:  # no class folder at all, or one without images
        raise UserError(" ".join(f"{directory}: {error}".split())) from error


def _transforms(input_size: tuple[int, int, int]) -> tuple[Callable[[Any], Tensor], Callable[[Any], Tensor]]:
    from torchvision.transforms import v2

    channels, height, width = input_size
    mean, std = (IMAGENET_MEAN, IMAGENET_STD) if channels == 3 else ((0.5,), (0.5,))
    grey = [v2.Grayscale()] if channels == 1 else []
    end = [*grey, v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(mean), list(std))]
    shorter_side = max(height, width) * 8 // 7  # 256 for 224, as ImageNet is usually evaluated
    train = v2.Compose([v2.RandomResizedCrop((height, width)), v2.RandomHorizontalFlip(), *end])
    test = v2.Compose([v2.Resize(shorter_side), v2.CenterCrop((height, width)), *end])
    return train, test
