"""Timing candidates against each other: in turn, synchronized, on rotating inputs, by their medians; and the winner."""

import datetime
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from fastcnn.backend import only_here
from fastcnn.tuning.attempts import Attempts
from fastcnn.tuning.candidates import STOCK
from fastcnn.tuning.places import Place, Run, Times
from fastcnn.tuning.stage import Stage
from fastcnn.tuning.table import Winner

MARGIN = 0.03  # a winner beats stock by more than this and more than the noise
COLD_BYTES = 256 * 2**20  # of inputs that rotate on a GPU: several times its L2 cache
MOST_COPIES = 16
MOST_CALLS = 1000  # in one measurement
TOO_NOISY = "measured on this device: too noisy to tell, stock kept"


class Effort(NamedTuple):
    """What is spent on timing: the rounds, the fewest where calls take long, and what one measurement in one lasts."""

    rounds: int
    least_rounds: int
    seconds: float
    hopeless: float = math.inf  # a candidate that first takes this many times stock's seconds is not timed again


def contest(
    stage: Stage,
    key: dict[str, Any],
    sound: Sequence[Winner],
    place: Place,
    attempts: Attempts,
    effort: Effort,
    by: str,
) -> tuple[dict[Winner, Times], float, dict[str, Any]]:
    """Time stock and the candidates that passed parity: their times, the noise, and the entry of the table.

    `by` tells the entry who did. Raises Lost where a candidate has left the GPU unusable for this process.
    """
    run = _step(stage, key["mode"], place.device)

    def measure(candidate: Winner, times: int) -> Times:
        with attempts.under_way(stage, candidate), only_here(*candidate):
            run(0)  # plans, and warms caches that others have used meanwhile
            return place.measure(run, times)

    times, noise = race([STOCK, *sound], measure, effort)
    winner, too_noisy = fastest(times, noise)
    entry = {
        "key": key,
        "backend": winner.backend,
        "algorithm": winner.algorithm,
        "seconds": times[winner].call,
        "stock_seconds": times[STOCK].call,
        "device_seconds": times[winner].device,
        "stock_device_seconds": times[STOCK].device,
        "noise": round(noise, 4),
        "measured": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}",
        "by": by,
    }
    return times, noise, entry | ({"why": TOO_NOISY} if too_noisy else {})


def race(
    offered: Sequence[Winner], measure: Callable[[Winner, int], Times], effort: Effort
) -> tuple[dict[Winner, Times], float]:
    """Return the candidates' median times, and by how much two times of stock differ.

    Each round measures all, so that a slow spell affects all, and stock, the first candidate, at both ends.
    """
    first = {each: measure(each, 1) for each in offered}  # all have run before, for parity
    stock = first[STOCK].call
    racing = [each for each in offered if each == STOCK or first[each].call < effort.hopeless * stock]
    if racing == [STOCK] and math.isfinite(effort.hopeless):
        return {STOCK: first[STOCK]}, 0.0
    turns = [*racing, STOCK]
    counts = [max(1, min(round(effort.seconds / max(first[each].call, 1e-7)), MOST_CALLS)) for each in turns]
    rounds = max(effort.least_rounds, min(effort.rounds, round(2 * effort.seconds * effort.rounds / max(stock, 1e-7))))
    seen = [[measure(*each) for each in zip(turns, counts)] for _ in range(rounds)]
    medians = [Times(*map(statistics.median, zip(*mine))) for mine in zip(*seen)]
    noise = max(abs(a - b) / max(min(a, b), 1e-12) for a, b in zip(medians[0], medians[-1]))
    medians[0] = Times(*map(min, medians[0], medians[-1]))
    return dict(zip(racing, medians)), noise


def fastest(times: dict[Winner, Times], noise: float) -> tuple[Winner, bool]:
    """Return the winner, and whether stock is kept although a kernel was faster, by no more than the noise."""
    winner = _beats_stock(times, max(noise, MARGIN))
    return winner, winner == STOCK != _beats_stock(times, MARGIN)


def _beats_stock(times: dict[Winner, Times], clear: float) -> Winner:
    """Return what beats stock by more than `clear`, by the device's time or the call's, and loses by neither."""
    best, found = 0.0, STOCK
    for candidate, mine in times.items():
        gains = [math.log(theirs / max(own, 1e-12)) for own, theirs in zip(mine, times[STOCK])]
        if candidate != STOCK and max(gains) > clear and min(gains) > -clear and sum(gains) > best:
            best, found = sum(gains), candidate
    return found


def _step(stage: Stage, mode: str, device: torch.device) -> Run:
    """Return one call of a stage, with its backward in training; the input is another one at each turn."""
    tensors, generator = stage.draw(device, rounded=False), torch.Generator(device).manual_seed(1)
    count = min(2 + COLD_BYTES // max(tensors["input"].nbytes, 1), MOST_COPIES) if device.type == "cuda" else 2
    draws = [tensors | {"input": stage.draw_one("input", generator, rounded=False)} for _ in range(count)]
    leaves = [[each for each in draw.values() if each.requires_grad] for draw in draws]
    with torch.no_grad(), only_here("torch"):
        cotangent = stage.call(tensors)
    cotangent = torch.empty_like(cotangent).normal_(generator=generator)

    def inference(turn: int) -> object:
        with torch.no_grad():
            return stage.call(draws[turn % count])

    def training(turn: int) -> object:
        with torch.enable_grad():
            return torch.autograd.grad(stage.call(draws[turn % count]), leaves[turn % count], cotangent)

    return training if mode == "training" else inference
