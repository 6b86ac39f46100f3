"""The trial: a stage that no table covers is tried at its first eager call, against stock torch, on the user's device.

First the parity of each candidate is checked, then the candidates are timed; the winner goes into memory and into the
user's table. `off` says why a call is not tried.
"""

import contextlib
import datetime
import logging
import math
import os
import statistics
import threading
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastcnn.backend import only_here
from fastcnn.tuning import proof, telling
from fastcnn.tuning.attempts import Attempts, Lost
from fastcnn.tuning.call import batch_of, call_of, describe, setting_of, text
from fastcnn.tuning.candidates import STOCK, TOO_NOISY
from fastcnn.tuning.lookup import entries_of, learn
from fastcnn.tuning.parity import Reference
from fastcnn.tuning.places import Place, place_of
from fastcnn.tuning.stage import Stage, tensors_of
from fastcnn.tuning.table import Winner, merge, user_path
from fastcnn.tuning.timing import Run, Times, step

logger = logging.getLogger("fastcnn")

SECONDS = 0.25  # the most that timing takes, roughly, without compilation
ROUNDS = 5
IMAGES = 2  # the number compared with float64
MARGIN = 0.03  # a winner beats stock by more than this and more than the noise
HOPELESS = 1.5  # a candidate that first takes this many times stock's seconds is not timed again

_one = threading.Lock()


CAPTURING = "nothing is tried while a graph is captured"
BUSY = "another thread is trying a stage"


def concerns(input: Tensor) -> bool:
    """Whether a tensor's device is one for trials: a GPU, or a CPU under FASTCNN_TRIAL=1; `off` may still refuse."""
    place = place_of(input.device)
    return place is not None and (place.by_default or os.environ.get("FASTCNN_TRIAL") == "1")


def off(op: str, arguments: tuple[Any, ...]) -> str:
    """Say why a call that is not in the tables is not tried, or return an empty string; on a GPU warn of it."""
    input: Tensor = arguments[0]
    if any(isinstance(each, Tensor) and type(each) not in _PLAIN for each in arguments):
        return "tried at its first eager call"
    if input.dtype not in _DTYPES or input.numel() == 0:
        return f"no kernel takes {input.dtype}" if input.numel() else "an empty batch is not tried"
    place = place_of(input.device)
    assert place is not None
    if place.is_capturing():
        return CAPTURING
    why = _off(op, input, place)
    if why and place.by_default:
        telling.warn_of_stock(place.name, batch_of(describe(call_of(op, arguments, setting_of(op, "cuda")))), why)
    return why


def _off(op: str, input: Tensor, place: Place) -> str:
    if os.environ.get("FASTCNN_TRIAL") == "0":
        return "FASTCNN_TRIAL=0"
    if torch._C._are_functorch_transforms_active() or torch._C._len_torch_dispatch_stack():
        return "nothing is tried under torch.func or a dispatch mode"
    if torch.autograd.forward_ad._current_level >= 0:
        return "nothing is tried under forward-mode derivatives"
    if torch.are_deterministic_algorithms_enabled():
        return "nothing is tried under torch.use_deterministic_algorithms"
    return "" if place.light(op) else "no kernel of it is here"


_PLAIN = (Tensor, torch.nn.Parameter)
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def run(op: str, arguments: tuple[Any, ...]) -> bool:
    """Try a call's stage, so that the tables have it then; return whether they do.

    They do not where another thread is trying a stage at the moment: this call runs stock. Where a trial fails as a
    whole, stock is what this process keeps.

    Raises:
        Lost: a candidate has left the GPU unusable for this process.
    """
    input: Tensor = arguments[0]
    place = place_of(input.device)
    if place is None or not _one.acquire(blocking=False):
        return False
    try:
        stage, own = Stage.of(op, arguments), tensors_of(op, arguments)
        key = describe(call_of(op, arguments, setting_of(op, input.device.type)))
        if text(key) not in entries_of(input.device):  # else another thread has just tried it
            learn(input.device, _entry(stage, key, own, place))
    finally:
        _one.release()
    return True


def _entry(stage: Stage, key: dict[str, Any], own: dict[str, Tensor], place: Place) -> dict[str, Any]:
    try:
        verdicts = proof.verdicts(place)
        with _apart(place.device), telling.under_way(f"trying kernels for each stage on {place.name}, once"):
            entry = _tried(stage, key, own, place, verdicts)
        telling.tried(place.name, user_path(place.name), faster=entry["backend"] != "torch")
        return entry
    except Lost:
        raise
    except Exception as error:  # the user's call has nothing to do with it
        telling.once(f"stages are not tried on {place.name}: {type(error).__name__}: {error}")
        return _stock(key, "it could not be tried")


@contextlib.contextmanager
def _apart(device: torch.device) -> Iterator[None]:
    """Keep a trial out of what the user's call is under: inference mode, hooks on saved tensors, autocast's cache."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        if torch._C._autograd._top_saved_tensors_default_hooks(True):  # else the front runs what is tried
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(lambda each: each, lambda each: each))
        stack.enter_context(torch._C.DisableTorchFunctionSubclass())
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
            stack.enter_context(torch.autocast(device.type, dtype=dtype, cache_enabled=False))
        yield


def _tried(
    stage: Stage, key: dict[str, Any], own: dict[str, Tensor], place: Place, verdicts: dict[str, str]
) -> dict[str, Any]:
    """Return the entry of a stage, stock's without a time where nothing could be tried."""
    path = user_path(place.name)
    attempts = Attempts(path, place.device, ends=False)
    offered = [each for each in place.light(stage.op) if not verdicts.get(proof.kernel_name(stage.op, each), "")]
    offered = [each for each in offered if not _ended_a_process(stage, each, attempts)]
    try:
        entry = _measured(stage, key, own, place, offered, attempts)
    except Lost:
        raise
    except torch.OutOfMemoryError:
        place.make_room()
        return _stock(key, "the trial ran out of memory")
    except Exception as error:  # stock torch has no such operation here
        logger.info("%s %s is not tried: %s: %s", stage.op, stage, type(error).__name__, error)
        return _stock(key, "it could not be tried")
    _keep(path, place.name, entry)
    return entry


def _ended_a_process(stage: Stage, candidate: Winner, attempts: Attempts) -> bool:
    problem = attempts.problem(stage, candidate)
    if problem:
        logger.warning("%s %s runs without %s: %s", stage.op, stage, candidate, problem)
    return bool(problem)


def _stock(key: dict[str, Any], why: str) -> dict[str, Any]:
    return {"key": key, "backend": "torch", "algorithm": None, "why": why}


def _keep(path: Path, name: str, entry: dict[str, Any]) -> None:
    try:
        merge(path, name, [entry])
    except (OSError, NotImplementedError) as error:  # NotImplementedError: a file system without locks
        telling.once(f"results of trials cannot be stored: {path}: {error}")


def _measured(
    stage: Stage,
    key: dict[str, Any],
    own: dict[str, Tensor],
    place: Place,
    offered: Sequence[Winner],
    attempts: Attempts,
) -> dict[str, Any]:
    mode = key["mode"]
    sound = _in_parity(stage, mode, own, place, offered, attempts)
    times, noise = _timed([STOCK, *sound], step(stage, mode, place.device), place, partial(attempts.under_way, stage))
    winner = _fastest(times, max(noise, MARGIN))
    why = {}
    if not sound:
        why = {"why": "no kernel passed its trial on this device"}
    elif winner == STOCK != _fastest(times, MARGIN):
        why = {"why": TOO_NOISY}
    return {
        "key": key,
        "backend": winner.backend,
        "algorithm": winner.algorithm,
        "seconds": times[winner].call,
        "stock_seconds": times[STOCK].call,
        "device_seconds": times[winner].device,
        "stock_device_seconds": times[STOCK].device,
        "noise": round(noise, 4),
        "measured": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}",
        "by": "trial",
        **why,
    }


def _in_parity(
    stage: Stage, mode: str, own: dict[str, Tensor], place: Place, offered: Sequence[Winner], attempts: Attempts
) -> list[Winner]:
    """Return the candidates that keep the parity rule on the call's own tensors and on drawn ones."""
    if not offered:
        return []
    usable = all(each.isfinite().all() for each in own.values() if each.is_floating_point())
    reference = Reference(
        stage,
        place.device,
        own=own if usable else None,
        gradients=mode == "training",
        images=IMAGES,
        poison=False,
    )
    return [each for each in offered if not _problem(reference, each, attempts)]


def _problem(reference: Reference, candidate: Winner, attempts: Attempts) -> str:
    stage = reference.stage
    try:
        with attempts.under_way(stage, candidate):
            _, problem = reference.compare(candidate)
    except (Lost, torch.OutOfMemoryError):
        raise
    except Exception as error:
        problem = f"{type(error).__name__}: {' '.join(str(error).split())}"
        if f"backend {candidate.backend!r}" in problem:  # it takes no such arguments
            return problem
    if problem:
        logger.warning("%s %s runs without %s, which failed its trial: %s", stage.op, stage, candidate, problem)
    return problem


def _timed(offered: Sequence[Winner], run: Run, place: Place, watch: Any) -> tuple[dict[Winner, Times], float]:
    """Return the medians of the candidates that can win, and by how much two times of stock differ."""

    def measure(candidate: Winner, times: int) -> Times:
        with watch(candidate), only_here(*candidate):
            run(0)  # what was planned is forgotten wherever the choice changes
            return place.measure(run, times)

    first = {each: measure(each, 1) for each in offered}  # all have run before, for parity
    racing = [each for each in offered if each == STOCK or first[each].call < HOPELESS * first[STOCK].call]
    if racing == [STOCK]:
        return {STOCK: first[STOCK]}, 0.0
    turns = [*racing, STOCK]  # stock stands at both ends of a round
    share = SECONDS / ROUNDS / len(turns) / 2
    counts = [max(1, min(round(share / max(first[each].call, 1e-7)), 1000)) for each in turns]
    rounds = ROUNDS if first[STOCK].call < 2 * share else max(2, min(ROUNDS, round(share * ROUNDS / first[STOCK].call)))
    seen: list[list[Times]] = [[] for _ in turns]
    for _ in range(rounds):
        for mine, candidate, count in zip(seen, turns, counts):
            mine.append(measure(candidate, count))
    medians = [Times(*map(statistics.median, zip(*mine))) for mine in seen]
    noise = max(abs(a - b) / max(min(a, b), 1e-12) for a, b in zip(medians[0], medians[-1]))
    medians[0] = Times(*map(min, medians[0], medians[-1]))
    return dict(zip(racing, medians)), noise


def _fastest(times: dict[Winner, Times], clear: float) -> Winner:
    """Return what beats stock by more than `clear`, by the device's time or the call's, and loses by neither."""
    best, found = 0.0, STOCK
    for candidate, mine in times.items():
        gains = [math.log(theirs / max(own, 1e-12)) for own, theirs in zip(mine, times[STOCK])]
        if candidate != STOCK and max(gains) > clear and min(gains) > -clear and sum(gains) > best:
            best, found = sum(gains), candidate
    return found
