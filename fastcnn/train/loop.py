"""The training loop: plain PyTorch, for one network at a time."""

import contextlib
import copy
import functools
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
from fastcnn.train.graphed import CAPTURES, GraphedStep, make_capturable
from fastcnn.train.memory import peak_memory

REPORT_SECONDS = 0.1  # between two readings of the losses, which make the CPU wait for a GPU
STEPS_PER_GRAPH = 10  # a launch costs some 10 microseconds, a fifth of an MNIST step; Ctrl-C waits for the last of them
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "sgd": functools.partial(torch.optim.SGD, momentum=0.9),
}
DEFAULT_LR = {"adam": 1e-3, "sgd": 1e-2}
AMP_DTYPES = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}
# How an optimizer runs rather than what it computes: it follows the device, not the checkpoint. The learning rate does
# too, as it is a tensor on a GPU; its value is one of the settings.
OF_THE_DEVICE = ("lr", "capturable", "foreach", "fused")


def build_optimizer(name: str, model: nn.Module, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """Build an optimizer of ``OPTIMIZERS``; on a GPU a fused one, ready for CUDA graphs.

    Example:
        >>> build_optimizer("adam", nn.Linear(2, 1), lr=0.01, weight_decay=0.0).param_groups[0]["lr"]
        0.01
    """
    parameters = list(model.parameters())
    fused = True if parameters[0].device.type in CAPTURES else None
    optimizer = OPTIMIZERS[name](parameters, lr=lr, weight_decay=weight_decay, fused=fused)
    make_capturable(optimizer)  # without graphs too, so that the losses are the same
    return optimizer


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load the state of the same optimizer, whatever the kind of device that it was saved on."""
    groups = [
        {**saved, **{name: own[name] for name in OF_THE_DEVICE if name in own}}
        for saved, own in zip(state["param_groups"], optimizer.param_groups, strict=True)
    ]
    optimizer.load_state_dict({**state, "param_groups": groups})


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
        graph: capture training and evaluation into CUDA graphs.
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
    graph: bool = False
    epochs: list[Epoch] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    step: int = 0
    seconds: float = 0.0
    peak_memory_bytes: int | None = None

    def __post_init__(self) -> None:
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.amp == "fp16")
        self._graphed: dict[str, GraphedStep] = {}
        torch.manual_seed(self.seed)
        self._rng = self._rng_state()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_graphed": {}}  # a copy has parameters of its own

    @property
    def steps_at_once(self) -> int:
        """How many steps are drawn, and captured, together."""
        return STEPS_PER_GRAPH if self.graph else 1

    def graphed(
        self, name: str, step: Callable[..., Tensor], optimizer: torch.optim.Optimizer | None = None
    ) -> Callable[..., Tensor]:
        """Return ``step``, or what replays it as a CUDA graph: the same one for the same name."""
        if not self.graph:
            return step
        if name not in self._graphed:
            self._graphed[name] = GraphedStep(step, optimizer)
        return self._graphed[name]

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Run under this lane's backend and from where its random number stream stands."""
        self._set_rng_state(self._rng)
        backend = fastcnn.use_backend(self.backend) if self.backend else contextlib.nullcontext()
        with backend:
            yield
        self._rng = self._rng_state()

    def cuda_graphs(self) -> str:
        """Say whether training runs as CUDA graphs: ``captured``, ``off``, or why it cannot."""
        step = self._graphed.get("train")
        return (step.reason or "captured") if step else "off"

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
        load_optimizer(self.optimizer, state["optimizer"])
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


def train_steps(lane: Lane, data: Dataset, *draws: Tensor) -> Tensor:
    """Take a step for each draw and return the losses, (steps,)."""
    return torch.stack([train_step(lane, *data.batch(*draw)) for draw in zip(*draws)])


def train_epoch(lane: Lane, data: Dataset, report: Callable[[], None], stopped: Callable[[], bool]) -> None:
    """Train from ``lane.step`` to the end of the epoch, or until ``stopped()`` is true after a step.

    Args:
        lane: the network; its step, losses and seconds are brought up to date.
        data: the data set.
        report: called now and then, after the losses are in.
        stopped: asked after each step, or after the steps of one CUDA graph, whether to stop.

    Raises:
        UserError: the loss is no longer finite.
    """
    lane.model.train()
    take_steps = lane.graphed("train", functools.partial(train_steps, lane, data), lane.optimizer)
    unread: list[Tensor] = []
    with lane.running():
        started = time.perf_counter()
        for draws in data.train_draws(len(lane.epochs), lane.step, lane.steps_at_once):
            unread.append(take_steps(*draws))
            lane.step += len(draws[0])
            if time.perf_counter() - started > REPORT_SECONDS:
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
    values = torch.cat(unread).tolist() if unread else []
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


def score(lane: Lane, data: Dataset, *draws: Tensor) -> Tensor:
    """Return for each draw the sum of the losses and the number of right answers, (batches, 2)."""
    results = []
    for draw in zip(*draws):
        images, labels = data.batch(*draw)
        with lane.autocast():
            scores = lane.model(images).float()
        num_correct = (scores.argmax(1) == labels).sum()
        results.append(torch.stack([F.cross_entropy(scores, labels, reduction="sum"), num_correct]))
    return torch.stack(results)


@torch.no_grad()
def evaluate(lane: Lane, data: Dataset, stopped: Callable[[], bool]) -> tuple[float, float] | None:
    """Return mean loss and accuracy in [0, 1] over the held-out images, or None when ``stopped()`` became true."""
    lane.model.eval()
    score_batches = lane.graphed("evaluate", functools.partial(score, lane, data))
    results = []
    with lane.running():
        for draws in data.test_draws(lane.steps_at_once):
            results.append(score_batches(*draws))
            if stopped():
                return None
    loss_sum, num_correct = torch.cat(results).sum(0).tolist()
    return loss_sum / data.test_size, num_correct / data.test_size


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
