"""The trial: a stage that no table covers is tried at its first eager call, against stock torch, on the user's device.

First the parity of each candidate is checked, then the candidates are timed; the winner goes into memory and into the
user's table.
"""

import contextlib
import logging
import os
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastcnn.overrides import PLAIN
from fastcnn.tuning import proof, telling
from fastcnn.tuning.attempts import Attempts, Lost
from fastcnn.tuning.call import batch_of, key_of, text
from fastcnn.tuning.candidates import light
from fastcnn.tuning.lookup import entries_of, learn
from fastcnn.tuning.parity import Reference, check
from fastcnn.tuning.places import PLACES, Place, place_of
from fastcnn.tuning.stage import Stage, tensors_of
from fastcnn.tuning.table import Winner, merge, user_path
from fastcnn.tuning.timing import Effort, contest

logger = logging.getLogger("fastcnn")

SECONDS = 0.25  # the most that timing takes, roughly, without compilation
ROUNDS, LEAST_ROUNDS = 5, 2
IMAGES = 2  # the number compared with float64

CAPTURING = "nothing is tried while a graph is captured"
BUSY = "another thread is trying a stage"

_one = threading.Lock()


def concerns(input: Tensor) -> bool:
    """Whether a tensor's device is one for trials: a GPU, or a CPU under FASTCNN_TRIAL=1."""
    has_place = input.device.type in PLACES
    return has_place and (place_of(input.device).by_default or os.environ.get("FASTCNN_TRIAL") == "1")


def run(op: str, arguments: tuple[Any, ...]) -> str:
    """Try the stage of a call on a device that `concerns` trials; say why not, or return an empty string.

    The tables have the stage then. Where a trial fails as a whole, stock is what this process keeps. A GPU that runs
    stock is warned of. Raises Lost where a candidate has left the GPU unusable for this process.
    """
    input: Tensor = arguments[0]
    place = place_of(input.device)
    if why := _unfit(op, arguments) or (CAPTURING if place.is_capturing() else ""):
        return why
    if why := _off(op, input.device):
        if place.by_default:
            telling.warn_of_stock(place.name, batch_of(key_of(op, arguments)), why)
        return why
    if not _one.acquire(blocking=False):
        return BUSY
    try:
        stage = Stage.of(op, arguments)
        own = {name: each.detach() for name, each in tensors_of(op, arguments).items()}
        key = key_of(op, arguments)
        if text(key) not in entries_of(input.device):  # else another thread has just tried it
            learn(input.device, _entry(stage, key, own, place))
    finally:
        _one.release()
    return ""


def _unfit(op: str, arguments: tuple[Any, ...]) -> str:
    """Say why no call of this kind is tried, or return an empty string."""
    input = arguments[0]
    if any(isinstance(each, Tensor) and type(each) not in PLAIN for each in arguments):
        return "tried at its first eager call"
    if input.dtype not in proof.DTYPES or input.numel() == 0:
        return f"no kernel takes {input.dtype}" if input.numel() else "an empty batch is not tried"
    return (
        "a trial compares one output, and this call returns indices too" if op == "max_pool" and arguments[-1] else ""
    )


def _off(op: str, device: torch.device) -> str:
    """Say why nothing is tried in this state of the process, or return an empty string."""
    if os.environ.get("FASTCNN_TRIAL") == "0":
        return "FASTCNN_TRIAL=0"
    if torch._C._are_functorch_transforms_active() or torch._C._len_torch_dispatch_stack():
        return "nothing is tried under torch.func or a dispatch mode"
    if torch.autograd.forward_ad._current_level >= 0:
        return "nothing is tried under forward-mode derivatives"
    if torch.are_deterministic_algorithms_enabled():
        return "nothing is tried under torch.use_deterministic_algorithms"
    return "" if light(op, device) else "no kernel of it is here"


def _entry(stage: Stage, key: dict[str, Any], own: dict[str, Tensor], place: Place) -> dict[str, Any]:
    try:
        verdicts = proof.verdicts(place)
        offered = [
            each for each in light(stage.op, place.device) if not verdicts.get(proof.kernel_name(stage.op, each))
        ]
        with _apart(place), telling.under_way(f"trying kernels for each stage on {place.name}, once"):
            tried = _tried(stage, key, own, place, offered)
        telling.tried(place.name, user_path(place.name), faster=tried["backend"] != "torch")
        return tried
    except Lost:
        raise
    except Exception as error:  # the user's call has nothing to do with it
        telling.once(f"stages are not tried on {place.name}: {type(error).__name__}: {error}")
        return _stock(key, "it could not be tried")


@contextlib.contextmanager
def _apart(place: Place) -> Iterator[None]:
    """Keep a trial out of what the user's call is under: inference mode, hooks on saved tensors, autocast's cache."""
    device = place.device
    with contextlib.ExitStack() as stack:
        stack.enter_context(place.apart())
        stack.enter_context(torch.inference_mode(False))
        if torch._C._autograd._top_saved_tensors_default_hooks(True):  # else the front runs what is tried
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(lambda each: each, lambda each: each))
        stack.enter_context(torch._C.DisableTorchFunctionSubclass())
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
            stack.enter_context(torch.autocast(device.type, dtype=dtype, cache_enabled=False))
        yield


def _tried(
    stage: Stage, key: dict[str, Any], own: dict[str, Tensor], place: Place, offered: list[Winner]
) -> dict[str, Any]:
    """Return the entry of a stage, stock's without a time where nothing could be tried."""
    path = user_path(place.name)
    try:
        measured = _measured(stage, key, own, place, offered, Attempts(path, place.device, ends=False))
    except Lost:
        raise
    except torch.OutOfMemoryError:
        place.make_room()
        return _stock(key, "the trial ran out of memory")
    except Exception as error:  # stock torch has no such operation here
        logger.info("%s %s is not tried: %s: %s", stage.op, stage, type(error).__name__, error)
        return _stock(key, "it could not be tried")
    try:
        merge(path, place.name, [measured])
    except (OSError, NotImplementedError) as error:  # NotImplementedError: a file system without locks
        telling.once(f"results of trials cannot be stored: {path}: {error}")
    return measured


def _stock(key: dict[str, Any], why: str) -> dict[str, Any]:
    return {"key": key, "backend": "torch", "algorithm": None, "why": why}


def _measured(
    stage: Stage, key: dict[str, Any], own: dict[str, Tensor], place: Place, offered: list[Winner], attempts: Attempts
) -> dict[str, Any]:
    """Check parity on the call's own tensors and on drawn ones, and time the candidates that keep it."""
    sound = []
    if offered:
        usable = all(each.isfinite().all() for each in own.values() if each.is_floating_point())
        training = key["mode"] == "training"
        reference = Reference(
            stage, place.device, own=own if usable else None, gradients=training, images=IMAGES, poison=False
        )
        sound = [each for each in offered if _passes(reference, each, attempts)]
    share = SECONDS / ROUNDS / (len(sound) + 2) / 2
    effort = Effort(ROUNDS, LEAST_ROUNDS, share, hopeless=1.5)
    _, _, entry = contest(stage, key, sound, place, attempts, effort, "trial")
    return entry if sound else entry | {"why": "no kernel passed its trial on this device"}


def _passes(reference: Reference, candidate: Winner, attempts: Attempts) -> bool:
    trial, stage = check(reference, candidate, attempts, raises=torch.OutOfMemoryError), reference.stage
    if trial.refused:
        logger.warning("%s %s runs without %s, which failed its trial: %s", stage.op, stage, candidate, trial.refused)
    return trial.is_sound
