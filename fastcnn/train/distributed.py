"""Several processes that train one network: who has which images, what they exchange, and who reports errors.

``torchrun`` starts the processes; each runs the same loop on its share of every global batch, so that the losses are
those of one process.
"""

import contextlib
import datetime
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import rendezvous  # type: ignore[attr-defined]
from torch.nn.parallel import DistributedDataParallel

from fastcnn.console.errors import UserError

STOPPED_BY_TORCHRUN = datetime.timedelta(seconds=20)  # torchrun checks every tenth of a second
STREAM_STRIDE = 1_000_003  # between the seeds of two processes' random streams


class Silenced(Exception):
    """An error stops this process; another process has reported it already."""


@dataclass(frozen=True)
class World:
    """The processes of a run: this one's number, how many there are, and the same on this machine.

    Example:
        >>> World(rank=1, size=2).share(9)
        slice(5, 9, None)
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    def share(self, count: int) -> slice:
        """Return the slice of a global batch of ``count`` images that is this process's share."""
        each = -(-count // self.size)
        return slice(min(self.rank * each, count), min((self.rank + 1) * each, count))

    def gather(self, value: Any) -> list[Any]:
        """Return every process's value, by rank; all processes must call it."""
        values: list[Any] = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values


@contextlib.contextmanager
def joined() -> Iterator[World]:
    """Join the processes that torchrun started, or be the only one.

    The first process that fails raises its error; :class:`Silenced` takes its place in the others.
    """
    if not dist.is_torchelastic_launched():
        yield World()
        return
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    world = World(*(int(os.environ[name]) for name in names))
    store, _, _ = next(iter(rendezvous("env://")))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size)
    try:
        yield world
    except BaseException as error:
        if store.add("fastcnn failed", 1) == 1:
            raise
        with contextlib.suppress(RuntimeError):  # if this process ended first, torchrun would stop the one that reports
            store.wait(["never"], STOPPED_BY_TORCHRUN)
        raise Silenced from error
    finally:
        dist.destroy_process_group()


class OneProcess:
    """The layout of one process, which has the whole network and the whole batch; the base of the other layouts."""

    splits = False  # parameters over the processes

    def __init__(self, model: nn.Module, world: World | None = None) -> None:
        self.module = model
        self.world = world or World()
        self.parts = World()  # the processes that scores, and with them labels and dropout, are divided among

    def scores(self, images: Tensor, labels: Tensor) -> Tensor:
        """Run the network on this process's images (n, C, H, W); ``labels`` (N,) are those of the global batch."""
        return self.module(images)

    def labels(self, labels: Tensor) -> Tensor:
        """Return the labels that belong to the scores."""
        return labels[self.parts.share(len(labels))]

    def loss(self, scores: Tensor, labels: Tensor) -> Tensor:
        """Return the loss to call ``backward`` on, whose gradients become those of the global batch's mean loss."""
        return F.cross_entropy(scores, labels)

    def mean_loss(self, loss: Tensor) -> Tensor:
        """Return the mean loss of the global batch from :meth:`loss`, detached."""
        return self.sum(loss) / self.parts.size if self.parts.size > 1 else loss

    def sum(self, values: Tensor) -> Tensor:
        """Add up what each process counted of its own scores."""
        if self.parts.size > 1:
            dist.all_reduce(values)
        return values

    def stream_seed(self, seed: int) -> int:
        """Return the seed of this process's random stream, from which dropout draws."""
        return seed + STREAM_STRIDE * self.parts.rank

    def own_stream(self, streams: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return this process's random stream from those saved by rank, or {} to begin a new one."""
        return streams[self.parts.rank] if self.parts.rank < len(streams) else {}

    def whole(self, state: Any) -> Any:
        """Return nested state with the tensors that are split put together; all processes must call it."""
        return state

    def split_like(self, whole: Any, own: Any) -> Any:
        """Split a whole tensor as ``own`` is, which has the same shape; return anything else as it is."""
        return whole


class DataParallel(OneProcess):
    """Every process has the whole network and a share of the batch; gradients are averaged (DDP)."""

    def __init__(self, model: nn.Module, world: World) -> None:
        super().__init__(DistributedDataParallel(model), world)
        self.parts = world

    def loss(self, scores: Tensor, labels: Tensor) -> Tensor:
        """Weigh by images rather than by processes: the last batch may not divide evenly."""
        return F.cross_entropy(scores, self.labels(labels), reduction="sum") * (self.world.size / len(labels))


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Return the linear layers of a network's classifier by name: of AlexNet 1, 4 and 6."""
    classifier = getattr(model, "classifier", nn.Identity())
    layers = {name: layer for name, layer in classifier.named_modules() if isinstance(layer, nn.Linear)}
    if not hasattr(model, "features") or not layers:
        raise UserError(
            "--parallel owt needs a network of features and classifier, as AlexNet and VGG are; "
            f"{type(model).__name__} is not, and --parallel ddp takes it"
        )
    return layers
