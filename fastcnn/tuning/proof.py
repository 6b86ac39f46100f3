"""The proof: a child process runs each light kernel on small cases before the first trial on a device with this build.

A kernel that crashes, hangs or computes wrong results there is left out of every trial. The verdicts are kept beside
the device's table, for this device, driver, versions and build.

    python -m fastcnn.tuning.proof cuda:0 < kernels, a line each

proves kernels, and writes before each ``begin NAME`` and after it ``end NAME``, with what is wrong after a tab.
"""

import contextlib
import itertools
import json
import os
import selectors
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch

from fastcnn.parameters import RECORDS, TENSORS
from fastcnn.tuning import telling
from fastcnn.tuning.call import Operand
from fastcnn.tuning.candidates import light
from fastcnn.tuning.parity import Reference, check
from fastcnn.tuning.places import Place
from fastcnn.tuning.stage import Stage
from fastcnn.tuning.table import Winner, replace, user_path

SECONDS = 240.0  # that a kernel may take for all its cases, compilations included
LONGEST = 900.0  # that a process waits for another one's proof
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMATS = (torch.contiguous_format, torch.channels_last)

# The cases of each op: tensors by their shapes, and settings, of which these hold where a case says nothing else.
_Case = dict[str, Any]
_SETTINGS: _Case = (
    {"stride": 1, "padding": 1, "dilation": 1, "groups": 1, "ceil_mode": False, "return_indices": False}
    | {"pool_size": 2, "pool_stride": 2, "pool_padding": 0, "pool_ceil_mode": False}
    | {"size": 5, "alpha": 1e-4, "beta": 0.75, "k": 2.0, "momentum": 0.1, "eps": 1e-5, "training": True}
)
_CONV: _Case = {"input": (3, 8, 9, 11), "weight": (16, 8, 3, 3), "bias": (16,)}
_STEM: _Case = {"input": (2, 3, 15, 13), "weight": (8, 3, 5, 5), "stride": 2, "padding": 2}
_BN: _Case = {"input": (5, 12, 7, 9), **dict.fromkeys(("running_mean", "running_var", "weight", "bias"), (12,))}
_LRN: _Case = {"input": (3, 24, 7, 9)}
_POOL: _Case = {"input": (3, 8, 13, 15), "stride": 2}
_WIDE = {"pool_size": 3, "pool_padding": 1, "pool_ceil_mode": True}
CASES: dict[str, list[_Case]] = {
    "add_relu": [{"input": (3, 8, 7, 9), "other": (3, 8, 7, 9)}],
    "bn_relu": [_BN, _BN | {"training": False}],
    "bn_relu_pool": [_BN, _BN | _WIDE],
    "conv_relu": [_CONV, _STEM],
    "conv_relu_pool": [_CONV, _STEM | _WIDE],
    "linear_relu": [{"input": (7, 24), "weight": (17, 24), "bias": (17,)}, {"input": (3, 40), "weight": (9, 40)}],
    "lrn": [_LRN],
    "lrn_pool": [_LRN, _LRN | _WIDE],
    "max_pool": [_POOL | {"kernel_size": 2, "padding": 0}, _POOL | {"kernel_size": 3, "ceil_mode": True}],
}


def kernel_name(op: str, candidate: Winner) -> str:
    """Return the name of a kernel in the verdicts: ``lrn: cuda``."""
    return f"{op}: {candidate}"


class NotStarted(Exception):
    """The child process has ended before it began with a kernel: that says nothing of kernels."""


_known: dict[str, dict[str, str]] = {}  # the verdicts that this process has read or found, by what they depend on
_not_started: dict[str, NotStarted] = {}  # by device


def verdicts(place: Place) -> dict[str, str]:
    """Return what is wrong with each light kernel on a device, an empty string where nothing is; prove what is new.

    Raises NotStarted where nothing can be proved; asked again, at once.
    """
    from filelock import FileLock

    if place.name in _not_started:
        raise _not_started[place.name]
    path, identity = path_of(place.name), place.identity()
    known = _known.setdefault(json.dumps(identity), {})
    if not _missing(place, known):
        return known
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError, NotImplementedError):  # no file can be written: this process alone knows
            path.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(f"{path}.lock", timeout=LONGEST))  # of several processes (DDP) one proves
        known |= read(path, identity)
        if missing := _missing(place, known):
            known |= _proved(place, missing)
            text = json.dumps({**identity, "verdicts": known}, indent=1) + "\n"
            with contextlib.suppress(OSError):
                replace(path, lambda file: file.write(text.encode()))
    return known


def path_of(name: str) -> Path:
    """Return where the verdicts of a device are."""
    return user_path(name).with_suffix(".proof.json")


def read(path: Path, identity: dict[str, Any]) -> dict[str, str]:
    """Return the verdicts in a file, if they are of this device and build."""
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        found = held.pop("verdicts")
    except (OSError, ValueError, AttributeError, KeyError):
        return {}
    return dict(found) if held == identity else {}


def _missing(place: Place, known: dict[str, str]) -> list[str]:
    names = (kernel_name(op, each) for op in CASES for each in light(op, place.device))
    return [name for name in names if name not in known]


def _proved(place: Place, names: list[str]) -> dict[str, str]:
    """Have child processes prove kernels, another one after each that ended or had to be ended."""
    found: dict[str, str] = {}
    what = f"checking {len(names)} kernels on {place.name} in a process of their own, once for this build"
    try:
        with telling.under_way(what, counts=False):
            while left := [name for name in names if name not in found]:
                found |= _in_a_child(place, left)
    except NotStarted as error:
        _not_started[place.name] = error.with_traceback(None)
        raise
    for name, problem in found.items():
        if problem:
            telling.once(f"kernel {name} is left out on {place.name}: {problem}")
    return found


def _in_a_child(place: Place, names: list[str]) -> dict[str, str]:
    """Return the verdicts of one child process: one at least, of a kernel that ended it if it ended early."""
    found: dict[str, str] = {}
    paths = os.pathsep.join(str(each) or os.getcwd() for each in sys.path)  # those of this process, and no other one
    environment = os.environ | {"FASTCNN_TRIAL": "0", "PYTHONPATH": paths, "PYTHONSAFEPATH": "1"}
    for each in ("FASTCNN_BACKEND", "FASTCNN_ALGORITHM"):
        environment.pop(each, None)
    with tempfile.TemporaryFile("w+") as errors, tempfile.TemporaryFile("w+") as asked:
        asked.write("\n".join(names))
        asked.seek(0)
        child = subprocess.Popen(
            place.child(), env=environment, stdin=asked, stdout=subprocess.PIPE, stderr=errors, bufsize=0
        )
        assert child.stdout is not None
        under_way = ""
        try:
            for line in _lines(child.stdout):
                kind, _, rest = line.partition(" ")
                under_way, _, problem = rest.partition("\t")
                if kind == "end":
                    found[under_way] = problem
            code = child.wait()
            problem = f"it ended its process ({f'signal {-code}' if code < 0 else f'exit status {code}'})"
        except TimeoutError:
            problem = f"it did not end within {SECONDS:g} s"
        finally:
            child.kill()
            child.wait()
        if left := [name for name in names if name not in found]:
            errors.seek(0)
            last = errors.read().strip().splitlines()[-1:]
            if not under_way:
                raise NotStarted(": ".join(["the process that checks kernels did not start", *last]))
            found[left[0]] = ": ".join([problem, *(last if not found and under_way == left[0] else [])])
    return found


def _lines(stream: IO[bytes]) -> Iterator[str]:
    """Yield the lines of an unbuffered stream until it ends; raise TimeoutError where none comes for `SECONDS`."""
    with selectors.DefaultSelector() as selector:
        selector.register(stream, selectors.EVENT_READ)
        while selector.select(SECONDS):
            if not (line := stream.readline()):
                return
            yield line.decode().rstrip("\n")
    raise TimeoutError


def stages(op: str) -> Iterator[Stage]:
    """Yield the small cases of an op in each dtype and layout; they run forward and backward."""
    record = RECORDS[op]
    for case, dtype, layout in itertools.product(CASES[op], DTYPES, FORMATS):
        if layout != torch.contiguous_format and len(case["input"]) != 4:
            continue
        tensors = {}
        for name in [name for name in record.named(*TENSORS) if name in case]:
            shape = case[name]
            like = torch.empty(shape, device="meta", memory_format=layout if len(shape) == 4 else None)
            kind = torch.float32 if op.startswith("bn") and len(shape) == 1 else dtype
            tensors[name] = Operand(shape, like.stride(), kind, not name.startswith("running"))
        settings = {name: case.get(name, _SETTINGS.get(name)) for name in record.names if name not in tensors}
        yield Stage(op, tensors, settings)


def prove(name: str, device: torch.device) -> str:
    """Say what is wrong with a kernel, or return an empty string."""
    op, _, text = name.partition(": ")
    backend, _, algorithm = text.partition(" ")
    candidate = Winner(backend, algorithm or None)
    for stage in stages(op):
        try:
            reference = Reference(stage, device)
        except RuntimeError:  # stock torch has no such operation here
            continue
        if wrong := check(reference, candidate).refused:
            dtype = str(stage.tensors["input"].dtype).removeprefix("torch.")
            return f"{stage}, {dtype}: {wrong}"
    return ""


def main() -> None:
    """Prove the kernels that standard input names on the device that the command line names."""
    device = torch.device(sys.argv[1])
    torch.zeros(1, device=device).item()  # a device that refuses this process says nothing of kernels
    for name in sys.stdin.read().splitlines():
        print(f"begin {name}", flush=True)
        problem = prove(name, device)
        print(f"end {name}\t{problem}", flush=True)


if __name__ == "__main__":
    main()
