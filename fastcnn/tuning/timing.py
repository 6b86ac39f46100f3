"""Timing candidates against each other: in turn, synchronized, on rotating inputs, by their medians."""

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch

from fastcnn.backend import only_here
from fastcnn.tuning.stage import Stage
from fastcnn.tuning.table import Winner

ROUNDS = 7
SECONDS = {"cpu": 0.03, "cuda": 0.01}  # that one measurement lasts, at the least
COLD_BYTES = 256 * 2**20  # of inputs that rotate on a GPU: several times its L2 cache
MOST_COPIES = 16

Run = Callable[[int], object]  # one call, on the inputs of this turn
Watch = Callable[[Winner], AbstractContextManager[None]]  # what a candidate runs in


class Times(NamedTuple):
    """Seconds of a call: with its launch, as in eager code, and of the device's work alone."""

    call: float
    device: float


def take_turns(
    candidates: Sequence[Winner], run: Run, device: torch.device, watch: Watch = lambda _: nullcontext()
) -> list[float]:
    """Return each candidate's median seconds a call; each round measures all, so that a slow spell affects all."""
    counts = []
    for candidate in candidates:
        with watch(candidate), only_here(*candidate):
            seconds_of(run, 1, device)  # compiles and warms up
            counts.append(max(1, round(SECONDS[device.type] / max(seconds_of(run, 2, device), 1e-7))))
    seen: list[list[float]] = [[] for _ in candidates]
    for _ in range(ROUNDS):
        for mine, candidate, times in zip(seen, candidates, counts):
            with watch(candidate), only_here(*candidate):
                mine.append(seconds_of(run, times, device))
    return [statistics.median(mine) for mine in seen]


def seconds_of(run: Run, times: int, device: torch.device) -> float:
    """Return the seconds of a call: the mean of `times` calls, the device's work included."""
    _synchronize(device)
    begin = time.perf_counter()
    for turn in range(times):
        run(turn)
    _synchronize(device)
    return (time.perf_counter() - begin) / times


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()  # a transfer elsewhere may be waiting for what follows


def copies(size: int, device: torch.device) -> int:
    """Return how many inputs of this many bytes rotate."""
    return min(2 + COLD_BYTES // max(size, 1), MOST_COPIES) if device.type == "cuda" else 2


def step(stage: Stage, mode: str, device: torch.device) -> Run:
    """Return one call of a stage, with its backward in training; the input is another one at each turn."""
    tensors = stage.draw(device, rounded=False)
    first = tensors["input"]
    count = copies(first.numel() * first.element_size(), device)
    draws = [tensors | {"input": first if turn == 0 else stage.another(first, turn)} for turn in range(count)]
    leaves = [[each for each in draw.values() if each.requires_grad] for draw in draws]
    with torch.no_grad(), only_here("torch"):
        cotangent = stage.call(tensors)
    cotangent = torch.empty_like(cotangent).normal_(generator=torch.Generator(device).manual_seed(count))

    def inference(turn: int) -> object:
        with torch.no_grad():
            return stage.call(draws[turn % count])

    def training(turn: int) -> object:
        with torch.enable_grad():
            return torch.autograd.grad(stage.call(draws[turn % count]), leaves[turn % count], cotangent)

    return training if mode == "training" else inference
