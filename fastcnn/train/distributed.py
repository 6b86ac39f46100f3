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
GRADIENT_BYTES = 4  # parameters, and so their gradients, are float32


class Silenced(Exception):
    """An error stops this process; another process has reported it already."""


@dataclass(frozen=True)
class World:
    """The processes of a run: this one's number, how many there are, and the same on this machine."""

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
    world = World(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")))
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


def bytes_sent(model: nn.Module, layout: str, batch_size: int, processes: int, activation_bytes: int = 4) -> int:
    """Return how many bytes each process sends in one training step, with ring algorithms.

    Of n bytes in all, an all-gather sends n (p - 1) / p from each of p processes, an all-reduce twice that. ``ddp``
    all-reduces every gradient. ``owt`` all-reduces the convolutions' gradients, gathers the features of the batch and
    the output of each linear layer, and all-reduces the gradient of each linear layer's input. ``batch_size`` is that
    of the global batch; an activation has 4 bytes, or 2 under autocast.
    """
    parameters = sum(parameter.numel() for parameter in model.parameters())
    reduced, gathered = GRADIENT_BYTES * parameters, 0
    if layout == "owt":
        layers = list(linear_layers(model).values())
        split = sum(parameter.numel() for layer in layers for parameter in layer.parameters())
        inputs, outputs = sum(layer.in_features for layer in layers), sum(layer.out_features for layer in layers)
        reduced = GRADIENT_BYTES * (parameters - split) + activation_bytes * batch_size * inputs
        gathered = activation_bytes * batch_size * (layers[0].in_features + outputs)
    return (2 * reduced + gathered) * (processes - 1) // processes


def volumes(model: nn.Module, batch_size: int, processes: int, activation_bytes: int = 4) -> str:
    """Say in one line what each layout sends.

    Example:
        >>> import fastcnn
        >>> volumes(fastcnn.AlexNet(), 128, 2)
        'each of 2 processes sends in a step of 128 images: ddp 244.4 MB, owt 23.5 MB'
    """
    said = []
    for layout in ("ddp", "owt"):
        with contextlib.suppress(UserError):  # owt is not for every network
            sent = bytes_sent(model, layout, batch_size, processes, activation_bytes)
            said.append(f"{layout} {sent / 1e6:.1f} MB")
    return f"each of {processes} processes sends in a step of {batch_size} images: {', '.join(said)}"
