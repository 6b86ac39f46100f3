"""Tuning a list of stages: parity first, then times, then the winner into the table."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastcnn.tuning import Winner, forget, parity
from fastcnn.tuning.attempts import Attempts
from fastcnn.tuning.candidates import STOCK, candidates
from fastcnn.tuning.device import device_name
from fastcnn.tuning.parity import Trial
from fastcnn.tuning.places import place_of
from fastcnn.tuning.stage import Stage
from fastcnn.tuning.table import holds, merge, user_path
from fastcnn.tuning.timing import TOO_NOISY, Effort, contest

logger = logging.getLogger("fastcnn")

MODES = ("inference", "training")
ROUNDS = 7
SECONDS = {"cpu": 0.03, "cuda": 0.005}  # that one measurement lasts, roughly; a GPU's is taken by two clocks in turn


class Result(NamedTuple):
    """A stage in one mode: all candidates, stock first, and the one that `auto` takes."""

    stage: Stage
    mode: str
    trials: list[Trial]
    noise: float  # by how much two times of stock differ, as a part of them
    winner: Trial
    entry: dict[str, Any]  # for the table

    @property
    def stock(self) -> float:
        """Return stock's seconds, the better of two."""
        return self.trials[0].seconds or 0.0

    @property
    def speedup(self) -> float:
        """Return how much faster than stock the winner is."""
        return self.stock / self.winner.seconds if self.winner.seconds else 1.0

    @property
    def too_noisy(self) -> bool:
        """Whether stock is kept although a kernel was faster, by no more than the noise."""
        return self.entry.get("why") == TOO_NOISY


def tune(
    stages: Iterable[Stage],
    device: torch.device,
    *,
    modes: Sequence[str] = MODES,
    only: str | None = None,
    path: Path | None = None,
    resume: bool = False,
) -> Iterator[Result]:
    """Time every candidate for each stage, store each winner as soon as it is known, and yield what was measured.

    A candidate that ends the process, or hangs on a GPU for two minutes, is left out at the next start; so is one that
    leaves the GPU unusable for this process, which raises `Lost`. `only` names the one backend to time against stock,
    `path` the table to write to instead of the user's; `resume` skips what that table has already.
    """
    name = device_name(device)
    target = path or user_path(name)
    attempts = Attempts(target, device)
    with _stock_at_its_best():
        for stage in stages:
            wanted = [mode for mode in modes if stage.occurs(mode)]
            if resume:
                wanted = [mode for mode in wanted if not holds(target, name, stage.key_in(mode, device), "tune")]
            if not wanted:
                continue
            try:
                checked = check(stage, candidates(stage.op, device, only), device, attempts)
            except RuntimeError as error:  # stock torch has no such operation here, or lacks memory
                logger.warning("%s %s is left out: stock torch cannot run it: %s", stage.op, stage, error)
                continue
            for mode in wanted:
                result = time_stage(stage, mode, checked, device, attempts)
                merge(target, name, [result.entry])
                yield result
    forget()


@contextmanager
def _stock_at_its_best() -> Iterator[None]:
    """Turn `cudnn.benchmark` on while the block runs, so that a winner also beats stock in programs that use it."""
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def check(stage: Stage, offered: list[Winner], device: torch.device, attempts: Attempts) -> list[Trial]:
    """Check the parity of each candidate but stock, the first."""
    reference = parity.Reference(stage, device)
    return [Trial(STOCK), *(parity.check(reference, each, attempts) for each in offered[1:])]


def time_stage(stage: Stage, mode: str, checked: list[Trial], device: torch.device, attempts: Attempts) -> Result:
    """Time the candidates that passed, stock first; gradients of our own are nothing to inference."""
    trials = [each for each in checked if mode == "training" or "+" not in (each.candidate.algorithm or "")]
    sound = [each.candidate for each in trials[1:] if each.is_sound]
    effort = Effort(ROUNDS, ROUNDS, SECONDS[device.type])
    times, noise, entry = contest(stage, stage.key_in(mode, device), sound, place_of(device), attempts, effort, "tune")
    trials = [each._replace(seconds=times[each.candidate].call if each.candidate in times else None) for each in trials]
    won = next(each for each in trials if each.candidate == Winner(entry["backend"], entry["algorithm"]))
    return Result(stage, mode, trials, noise, won, entry)
