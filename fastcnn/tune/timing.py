"""Timing candidates against each other: in turn, synchronised, on inputs that rotate, by their medians."""

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch

from fastcnn.backend import use_backend
from fastcnn.tuning import Winner

ROUNDS = 7
SECONDS = {"cpu": 0.03, "cuda": 0.01}  # that one measurement lasts, at the least
COLD_BYTES = 256 * 2**20  # of inputs that rotate on a GPU: several times its L2 cache
MOST_COPIES = 16

Run = Callable[[int], object]  # one call, on the inputs of this turn
Watch = Callable[[Winner], AbstractContextManager[None]]  # what a candidate runs in


def take_turns(
    candidates: Sequence[Winner], run: Run, device: torch.device, watch: Watch = lambda _: nullcontext()
) -> list[float]:
    """Return each candidate's median seconds a call; a round measures all, so that a slow spell slows them all."""
    counts = []
    for candidate in candidates:
        with watch(candidate):
            _measure(candidate, run, 1, device)  # compiles and warms up
            counts.append(max(1, round(SECONDS[device.type] / max(_measure(candidate, run, 2, device), 1e-7))))
    seen: list[list[float]] = [[] for _ in candidates]
    for _ in range(ROUNDS):
        for mine, candidate, times in zip(seen, candidates, counts):
            with watch(candidate):
                mine.append(_measure(candidate, run, times, device))
    return [statistics.median(mine) for mine in seen]


def _measure(candidate: Winner, run: Run, times: int, device: torch.device) -> float:
    """Return the seconds of a call: the mean of `times` calls, the device's work included."""
    with use_backend(candidate.backend, algorithm=candidate.algorithm):
        _synchronize(device)
        begin = time.perf_counter()
        for turn in range(times):
            run(turn)
        _synchronize(device)
        return (time.perf_counter() - begin) / times


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def copies(size: int, device: torch.device) -> int:
    """Return how many inputs of this many bytes rotate."""
    return min(2 + COLD_BYTES // max(size, 1), MOST_COPIES) if device.type == "cuda" else 2
