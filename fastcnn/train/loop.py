"""The training loop: plain PyTorch, for one network at a time; and when it writes a checkpoint."""

import contextlib
import copy
import functools
import logging
import math
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcnn.train.data import Dataset, Draws
from fastcnn.train.lane import Epoch, Lane
from fastcnn.train.memory import peak_memory

REPORT_SECONDS = 0.1  # between two readings of the losses: a reading makes the CPU wait for the GPU
WAITING_SHARE, WAITING_SECONDS = 0.2, 1.0  # of an epoch: waiting longer for images is reported
SHARE_OF_TIME = 0.05  # of training that writing checkpoints may take

logger = logging.getLogger("fastcnn")


class Pace:
    """Decides after which steps a checkpoint is written.

    That is every ``every`` steps; with 0, so often that writing takes at most a twentieth of the time, counted in steps
    so that several processes agree.
    """

    def __init__(self, every: int = 0) -> None:
        self.every = every
        self._interval = self._left = every or 1  # the first one tells how long writing takes
        self._started = time.perf_counter()

    def due(self, steps: int) -> bool:
        """Count steps; return whether it is time."""
        self._left -= steps
        return self._left <= 0

    def next_interval(self, write_seconds: float) -> int:
        """Return after how many steps the next checkpoint is due, given how long the last one took to write."""
        if self.every:
            return self.every
        step_seconds = (time.perf_counter() - self._started - write_seconds) / max(1, self._interval - self._left)
        return max(1, math.ceil(write_seconds / (SHARE_OF_TIME * max(step_seconds, 1e-6))))

    def restart(self, interval: int | None = None) -> None:
        """Start counting anew, to ``interval`` steps or to as many as before."""
        self._interval = self._left = interval or self._interval
        self._started = time.perf_counter()


def train_step(lane: Lane, images: Tensor, labels: Tensor) -> Tensor:
    """Take one optimizer step and return the loss, a scalar that stays on the device."""
    with lane.autocast():
        loss = lane.layout.loss(lane.layout.scores(images, labels), labels)
    lane.optimizer.zero_grad()
    lane.scaler.scale(loss).backward()
    lane.scaler.step(lane.optimizer)
    lane.scaler.update()
    return lane.layout.mean_loss(loss.detach())


def train_steps(lane: Lane, data: Dataset, *draws: Tensor) -> Tensor:
    """Take a step for each draw and return the losses, (steps,)."""
    return torch.stack([train_step(lane, *data.batch(*draw)) for draw in zip(*draws)])


def train_epoch(
    lane: Lane,
    data: Dataset,
    report: Callable[[], None],
    stopped: Callable[[], bool],
    pace: Pace | None = None,
    save: Callable[[], None] = lambda: None,
) -> None:
    """Train from ``lane.step`` to the end of the epoch, or until ``stopped()`` is true after a step or CUDA graph.

    ``report`` is called now and then, ``save`` after the steps that ``pace`` decides on: with the losses read, and the
    lane's state complete. Raises :class:`Diverged` once a loss is not finite.
    """
    lane.model.train()
    take_steps = lane.graphed("train", functools.partial(train_steps, lane, data), lane.optimizer)
    unread: list[Tensor] = []
    with lane.running():
        started = time.perf_counter()
        for draws in _timed(lane, data.train_draws(len(lane.epochs), lane.step, lane.steps_at_once)):
            unread.append(take_steps(*draws))
            lane.step += len(draws[0])
            due = pace is not None and pace.due(len(draws[0]))
            if due or time.perf_counter() - started > REPORT_SECONDS:
                _catch_up(lane, unread, started)
                report()
                if due:
                    lane.note_rng()
                    save()
                started = time.perf_counter()
            if stopped():
                break
        _catch_up(lane, unread, started)
        report()


def _timed(lane: Lane, draws: Iterator[Draws]) -> Iterator[Draws]:
    """Yield the draws, and add up the time spent waiting for them."""
    while True:
        started = time.perf_counter()
        drawn = next(draws, None)
        lane.waited += time.perf_counter() - started
        if drawn is None:
            return
        yield drawn


def _catch_up(lane: Lane, unread: list[Tensor], started: float) -> None:
    """Read the losses, which waits for the GPU, and count the time since ``started``."""
    values = torch.cat(unread).tolist() if unread else []
    unread.clear()
    for step, value in enumerate(values, start=lane.step - len(values) + 1):
        if not math.isfinite(value):
            raise lane.diverged(f"the loss became {value}", step)
    lane.losses += values
    if lane.device.type == "cuda":
        torch.cuda.synchronize(lane.device)
    lane.seconds += time.perf_counter() - started


def score(lane: Lane, data: Dataset, *draws: Tensor) -> Tensor:
    """Return (draws, 3), of this process's images: the sum of losses, the numbers that top-1 and top-5 get right."""
    results = []
    for draw in zip(*draws):
        images, all_labels = data.batch(*draw)
        with lane.autocast():
            scores = lane.layout.scores(images, all_labels).float()
        labels = lane.layout.labels(all_labels)
        first = scores.argmax(1) == labels
        five = scores.topk(min(5, scores.shape[1])).indices == labels.unsqueeze(1)
        results.append(torch.stack([F.cross_entropy(scores, labels, reduction="sum"), first.sum(), five.sum()]))
    return torch.stack(results)


@torch.no_grad()
def evaluate(lane: Lane, data: Dataset, stopped: Callable[[], bool]) -> tuple[float, float, float] | None:
    """Return mean loss, top-1 and top-5 accuracy in [0, 1] over the held-out images, or None once ``stopped()``."""
    lane.model.eval()
    score_batches = lane.graphed("evaluate", functools.partial(score, lane, data))
    results = []
    with lane.running():
        for draws in data.test_draws(lane.steps_at_once):
            results.append(score_batches(*draws))
            if stopped():
                return None
    loss, first, five = (lane.layout.sum(torch.cat(results).sum(0)) / data.test_size).tolist()
    return loss, first, five


def finish_epoch(lane: Lane, data: Dataset, test_loss: float, test_accuracy: float, test_top5: float) -> None:
    """Append an :class:`Epoch` of the steps since the last one, step the learning rate, and reset the counters."""
    epoch_losses = lane.losses[-lane.step :]
    lane.epochs.append(
        Epoch(
            loss=sum(epoch_losses) / len(epoch_losses),
            test_loss=test_loss,
            test_accuracy=test_accuracy,
            test_top5=test_top5,
            seconds=lane.seconds,
            waited=lane.waited,
            images_per_second=data.train_size / lane.seconds,
            lr=lane.lr,
        )
    )
    if lane.waited > max(WAITING_SECONDS, WAITING_SHARE * lane.seconds):
        told = f"{lane.title} waited for images {lane.waited:.0f} of the {lane.seconds:.0f} seconds of epoch"
        remedies = "more --workers, smaller images on the disk or a faster disk would make training faster"
        logger.warning("%s %d: %s", told, len(lane.epochs), remedies)
    lane.step_rate(len(lane.epochs))
    lane.step, lane.seconds, lane.waited = 0, 0.0, 0.0


def step_memory(lane: Lane, data: Dataset) -> int | None:
    """Return how many bytes a training step needs at its highest, or None where that cannot be counted."""
    try:
        with step_of_copy(lane, data) as step:
            step()  # the first one creates the optimizer's state and whatever else stays
            return peak_memory(step, lane.device)
    except torch.OutOfMemoryError:  # there was no room for the copy; the training itself had enough
        return None


@contextlib.contextmanager
def step_of_copy(lane: Lane, data: Dataset) -> Iterator[Callable[[], None]]:
    """Give a training step of a throw-away copy."""
    twin = copy.deepcopy(lane)
    images, labels = next(data.train_batches(epoch=0))
    twin.model.train()

    def step() -> None:
        train_step(twin, images, labels)
        twin.optimizer.zero_grad()  # so that the step's own gradients count, not those of the step before

    with twin.running():
        yield step
