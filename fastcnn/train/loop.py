"""The training loop: plain PyTorch, for one network at a time."""

import contextlib
import copy
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastcnn
from fastcnn.train.data import Dataset
from fastcnn.train.errors import UserError
from fastcnn.train.memory import peak_memory

REPORT_EVERY = 10  # steps between two readings of the loss, which make the CPU wait for a GPU
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": lambda parameters, lr, decay: torch.optim.Adam(parameters, lr=lr, weight_decay=decay),
    "sgd": lambda parameters, lr, decay: torch.optim.SGD(parameters, lr=lr, weight_decay=decay, momentum=0.9),
}
DEFAULT_LR = {"adam": 1e-3, "sgd": 1e-2}
AMP_DTYPES = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Epoch:
    """What one epoch of one network came to; the time is that of training, without the evaluation."""

    loss: float
    test_loss: float
    test_accuracy: float
    seconds: float
    images_per_second: float


@dataclass
class Lane:
    """One network on its way through training, with all that a checkpoint must hold to go on as if never stopped.

    Side by side, each lane has its own random number stream, so that dropout draws the same in both however the
    epochs are interleaved.

    Attributes:
        title: what the table and the progress bar call it.
        backend: the fastcnn backend it runs under; None for stock layers.
        losses: the loss of every step so far.
        step: steps done in the current epoch.
        seconds: time spent on them.
        peak_memory_bytes: what a step needs, known at the end of a run.
    """

    title: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    device: torch.device
    seed: int
    backend: str | None = None
    amp: str = "off"
    epochs: list[Epoch] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    step: int = 0
    seconds: float = 0.0
    peak_memory_bytes: int | None = None

    def __post_init__(self) -> None:
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.amp == "fp16")
        torch.manual_seed(self.seed)
        self._rng = self._rng_state()

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Run under this lane's backend and from where its random number stream stands."""
        self._set_rng_state(self._rng)
        backend = fastcnn.use_backend(self.backend) if self.backend else contextlib.nullcontext()
        with backend:
            yield
        self._rng = self._rng_state()

    def autocast(self) -> torch.autocast:
        """Return the autocast context that --amp asks for."""
        return torch.autocast(self.device.type, dtype=AMP_DTYPES[self.amp], enabled=self.amp != "off")

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain values that :meth:`load_state_dict` goes on from."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "rng": self._rng,
            "epochs": [asdict(epoch) for epoch in self.epochs],
            "losses": self.losses,
            "step": self.step,
            "seconds": self.seconds,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a :meth:`state_dict`."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self._rng = {**self._rng, **state["rng"]}
        self.epochs = [Epoch(**epoch) for epoch in state["epochs"]]
        self.losses, self.step, self.seconds = list(state["losses"]), state["step"], state["seconds"]

    def _rng_state(self) -> dict[str, Tensor]:
        state = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self.device)
        return state

    def _set_rng_state(self, state: dict[str, Tensor]) -> None:
        torch.set_rng_state(state["cpu"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda"], self.device)


def train_step(lane: Lane, images: Tensor, labels: Tensor) -> Tensor:
    """Take one optimizer step and return the loss, a scalar that stays on the device."""
    with lane.autocast():
        loss = F.cross_entropy(lane.model(images), labels)
    lane.optimizer.zero_grad()
    lane.scaler.scale(loss).backward()
    lane.scaler.step(lane.optimizer)
    lane.scaler.update()
    return loss.detach()


def train_epoch(lane: Lane, data: Dataset, report: Callable[[], None], stopped: Callable[[], bool]) -> None:
    """Train from ``lane.step`` to the end of the epoch, or until ``stopped()`` is true after a step.

    Args:
        lane: the network; its step, losses and seconds are brought up to date.
        data: the data set.
        report: called every few steps, after the losses are in.
        stopped: asked after each step whether to stop.

    Raises:
        UserError: the loss is no longer finite.
    """
    lane.model.train()
    unread: list[Tensor] = []
    with lane.running():
        started = time.perf_counter()
        for images, labels in data.train_batches(len(lane.epochs), lane.step):
            unread.append(train_step(lane, images, labels))
            lane.step += 1
            if len(unread) == REPORT_EVERY:
                _read(lane, unread)
                _add_time(lane, started)
                report()
                started = time.perf_counter()
            if stopped():
                break
        _read(lane, unread)
        _add_time(lane, started)
        report()


def _read(lane: Lane, unread: list[Tensor]) -> None:
    values = torch.stack(unread).tolist() if unread else []
    first_step = lane.step - len(values)
    for step, value in enumerate(values, start=first_step + 1):
        if not math.isfinite(value):
            raise UserError(
                f"{lane.title}: the loss became {value} in epoch {len(lane.epochs) + 1}, step {step}; "
                "a smaller --lr may help"
            )
    lane.losses += values
    unread.clear()


def _add_time(lane: Lane, started: float) -> None:
    if lane.device.type == "cuda":
        torch.cuda.synchronize(lane.device)
    lane.seconds += time.perf_counter() - started


@torch.no_grad()
def evaluate(lane: Lane, data: Dataset, stopped: Callable[[], bool]) -> tuple[float, float] | None:
    """Return mean loss and accuracy in [0, 1] over the held-out images, or None when ``stopped()`` became true."""
    lane.model.eval()
    loss_sum = torch.zeros((), device=lane.device)
    num_correct = torch.zeros((), device=lane.device, dtype=torch.int64)
    with lane.running():
        for images, labels in data.test_batches():
            with lane.autocast():
                scores = lane.model(images)
            loss_sum += F.cross_entropy(scores.float(), labels, reduction="sum")
            num_correct += (scores.argmax(1) == labels).sum()
            if stopped():
                return None
    return loss_sum.item() / data.test_size, num_correct.item() / data.test_size


def finish_epoch(lane: Lane, data: Dataset, test_loss: float, test_accuracy: float) -> None:
    """Turn the steps since the last epoch's end into an :class:`Epoch` and start counting anew."""
    epoch_losses = lane.losses[-lane.step :]
    lane.epochs.append(
        Epoch(
            loss=sum(epoch_losses) / len(epoch_losses),
            test_loss=test_loss,
            test_accuracy=test_accuracy,
            seconds=lane.seconds,
            images_per_second=data.train_size / lane.seconds,
        )
    )
    lane.step, lane.seconds = 0, 0.0


def warm_up(lane: Lane, data: Dataset) -> None:
    """Take one step on a throw-away copy, so that compiling and tuning kernels is not counted as training."""
    with _step_of_copy(lane, data) as step:
        step()


def step_memory(lane: Lane, data: Dataset) -> int | None:
    """Return how many bytes a training step needs at its highest, or None where that cannot be counted."""
    try:
        with _step_of_copy(lane, data) as step:
            step()  # the first one creates the optimizer's state and whatever else stays
            return peak_memory(step, lane.device)
    except torch.OutOfMemoryError:  # the copy was too much; the training itself went well
        return None


@contextlib.contextmanager
def _step_of_copy(lane: Lane, data: Dataset) -> Iterator[Callable[[], None]]:
    twin = copy.deepcopy(lane)
    images, labels = next(data.train_batches(epoch=0))
    twin.model.train()

    def step() -> None:
        train_step(twin, images, labels)
        twin.optimizer.zero_grad()  # gradients are part of what a step needs, so they do not wait for the next

    with twin.running():
        yield step
