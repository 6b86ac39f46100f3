"""Tuning a list of stages: parity first, then times, then the winner into the table."""

import datetime
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastcnn.tuning import Winner, forget, timing
from fastcnn.tuning.attempts import Attempts, Lost
from fastcnn.tuning.candidates import STOCK, TOO_NOISY, candidates, differs
from fastcnn.tuning.device import device_name
from fastcnn.tuning.parity import Reference
from fastcnn.tuning.stage import Stage
from fastcnn.tuning.table import holds, merge, user_path

logger = logging.getLogger("fastcnn")

MODES = ("inference", "training")
MARGIN = 0.02  # a winner beats stock by more than this and more than the noise


class Trial(NamedTuple):
    """A candidate's outcome: its seconds, or why it was not timed."""

    candidate: Winner
    seconds: float | None
    parity: float  # the largest error as a part of what is allowed
    problem: str = ""  # it does not serve the stage
    refused: str = ""  # it serves it wrongly, or does not run


class Result(NamedTuple):
    """A stage in one mode: all candidates, stock first, and the one that `auto` takes."""

    stage: Stage
    mode: str
    trials: list[Trial]
    noise: float  # by how much two times of stock differ, as a part of them
    winner: Trial
    key: dict[str, Any]
    too_noisy: bool = False  # a kernel was faster, by no more than the noise: stock is kept

    @property
    def stock(self) -> float:
        """Return stock's seconds, the better of two."""
        return self.trials[0].seconds or 0.0

    @property
    def speedup(self) -> float:
        """Return how much faster than stock the winner is."""
        return self.stock / self.winner.seconds if self.winner.seconds else 1.0


def tune(
    stages: Iterable[Stage],
    device: torch.device,
    *,
    modes: Sequence[str] = MODES,
    only: str | None = None,
    path: Path | None = None,
    resume: bool = False,
    left_alone: Callable[[int], None] = lambda count: None,
) -> Iterator[Result]:
    """Time every candidate for each stage, and store each winner as soon as it is known.

    A candidate that ends the process, or hangs on a GPU for two minutes, is left out at the next start.

    Args:
        stages: of a model (:func:`stages_of`).
        device: where they run.
        modes: ``inference`` (forward without gradient) and ``training`` (forward and backward).
        only: the one backend to time against stock; by default all that are available.
        path: the table to write to; by default the user's.
        resume: skip stages that the table has already.
        left_alone: called with the number of modes skipped of each stage.

    Yields:
        What was measured, stage by stage.

    Raises:
        Lost: a candidate has left the GPU unusable for this process.

    Example:
        >>> import fastcnn, torch
        >>> stages = stages_of(fastcnn.MnistCNN(), torch.randn(64, 1, 28, 28))
        >>> results = list(tune(stages, torch.device("cpu")))  # doctest: +SKIP
    """
    name = device_name(device)
    target = path or user_path(name)
    attempts = Attempts(target, device)
    with _stock_at_its_best():
        for stage in stages:
            wanted = [mode for mode in modes if occurs(stage, mode)]
            if resume:
                left = [mode for mode in wanted if not holds(target, name, stage.key_in(mode, device), "tune")]
                left_alone(len(wanted) - len(left))
                wanted = left
            if not wanted:
                continue
            try:
                checked = check(stage, candidates(stage.op, device, only), device, attempts)
            except RuntimeError as error:  # stock torch has no such operation here, or lacks memory
                logger.warning("%s %s is left out: stock torch cannot run it: %s", stage.op, stage, error)
                continue
            for mode in wanted:
                result = time_stage(stage, mode, checked, device, attempts)
                merge(target, name, [_entry(result)])
                yield result
    forget()


def occurs(stage: Stage, mode: str) -> bool:
    """Whether a stage occurs in a mode: training needs gradients; inference excludes batch norms in training."""
    return stage.trains if mode == "training" else not stage.by_batch


@contextmanager
def _stock_at_its_best() -> Iterator[None]:
    """Turn `cudnn.benchmark` on while the block runs, so that a winner also beats stock in programs that use it."""
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def check(stage: Stage, offered: list[Winner], device: torch.device, attempts: Attempts) -> list[Trial]:
    """Check the parity of each candidate; one that fails is not timed.

    Raises:
        Lost: a candidate has left the GPU unusable for this process.
    """
    reference = Reference(stage, device)
    return [Trial(STOCK, None, 0.0), *(_checked(reference, each, attempts) for each in offered if each != STOCK)]


def _checked(reference: Reference, candidate: Winner, attempts: Attempts) -> Trial:
    if problem := attempts.problem(reference.stage, candidate):
        return Trial(candidate, None, 0.0, refused=problem)
    try:
        with attempts.under_way(reference.stage, candidate):
            part, problem = reference.compare(candidate)
    except Lost:
        raise
    except Exception as error:
        said = " ".join(str(error).split())
        if f"backend {candidate.backend!r}" in said:  # it takes no such arguments
            return Trial(candidate, None, 0.0, problem=said)
        return Trial(candidate, None, 0.0, refused=f"{type(error).__name__}: {said}")  # no memory, or a compiler's
    return Trial(candidate, None, part, refused=problem)


def time_stage(stage: Stage, mode: str, checked: list[Trial], device: torch.device, attempts: Attempts) -> Result:
    """Time the candidates that passed, and stock twice: the difference of its two times is the noise."""
    checked = [trial for trial in checked if differs(trial.candidate, mode)]
    sound = [trial for trial in checked if not (trial.problem or trial.refused)]
    # Stock stands at both ends of a round.
    offered = [*(trial.candidate for trial in sound), STOCK]
    watch = partial(attempts.under_way, stage)
    *seconds, again = timing.take_turns(offered, timing.step(stage, mode, device), device, watch)
    noise = abs(seconds[0] - again) / min(seconds[0], again)
    seconds[0] = min(seconds[0], again)
    timed = {trial.candidate: trial._replace(seconds=value) for trial, value in zip(sound, seconds)}
    trials = [timed.get(trial.candidate, trial) for trial in checked]
    fastest = offered[seconds.index(min(seconds))]
    beaten = min(seconds) < seconds[0] * (1 - max(noise, MARGIN))
    too_noisy = not beaten and min(seconds) < seconds[0] * (1 - MARGIN)
    key = stage.key_in(mode, device)
    return Result(stage, mode, trials, noise, timed[fastest if beaten else STOCK], key, too_noisy)


def _entry(result: Result) -> dict[str, Any]:
    winner = result.winner
    return {
        "key": result.key,
        "backend": winner.candidate.backend,
        "algorithm": winner.candidate.algorithm,
        "seconds": winner.seconds,
        "stock_seconds": result.stock,
        "noise": round(result.noise, 4),
        "measured": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}",
        "by": "tune",
        **({"why": TOO_NOISY} if result.too_noisy else {}),
    }
