"""Which backends there are, and why one cannot run here."""

import functools
import importlib
import importlib.machinery
import importlib.util
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

BACKENDS = ("auto", "torch", "triton", "cuda", "cpu")
KERNEL_BACKENDS = BACKENDS[2:]  # those that have some


@dataclass(frozen=True)
class BackendStatus:
    """Whether a backend can run here, and if not, why.

    Example:
        >>> import fastcnn
        >>> fastcnn.backends()["torch"].available
        True
    """

    available: bool
    reason: str = ""
    build: str = ""  # of a compiled backend: what its kernels were built with and for


# Triton reads it when a kernel is defined: kernels then run in Triton's CPU interpreter.
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"


def _triton_missing() -> str:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed (pip install triton)"
    if INTERPRETING or torch.cuda.is_available():
        return ""
    return "no CUDA device (TRITON_INTERPRET=1, set before the process starts, runs the kernels on the CPU for tests)"


# The path of a library that plays the kernels of `cuda` on the CPU, for tests (tests/host_cuda).
_PLAYED = os.environ.get("FASTCNN_HOST_CUDA", "")

_BUILD = "pip install --no-build-isolation . in fastcnn's source folder"


def _load_extension() -> str:
    """Load fastcnn._C, which registers the compiled kernels; return why it cannot be, or an empty string."""
    if _PLAYED:
        torch.ops.load_library(_PLAYED)
    try:
        importlib.import_module("fastcnn._C")
    except ImportError as error:
        if error.name != "fastcnn._C" or importlib.util.find_spec("fastcnn._C"):
            return f"the compiled extension fastcnn._C cannot be loaded ({error}); build it again: {_BUILD}"
        ours = {f"_C{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES}
        others = sorted({file.name for file in Path(__file__).parent.glob("_C.*")} - ours)
        if others:
            return f"the compiled extension was built for another Python ({others[0]}); build it again: {_BUILD}"
        return f"the compiled extension fastcnn._C was not built; with a C++ compiler: {_BUILD}"
    return ""


_EXTENSION_PROBLEM = _load_extension()


def poison(on: bool) -> bool:
    """Have the CPU's kernels fill what they allocate with NaN first, or not; return what held before.

    For checks that nothing unwritten passes: those kernels allocate without torch's own filling.
    """
    if _EXTENSION_PROBLEM:  # there are none of those kernels
        return False
    extension: Any = importlib.import_module("fastcnn._C")
    return bool(extension.poison(on))


def _cuda_missing() -> str:
    if _PLAYED or _EXTENSION_PROBLEM:
        return "" if _PLAYED else _EXTENSION_PROBLEM
    if not _built_with()["cuda"]:
        return f"the compiled extension fastcnn._C holds no CUDA kernels; with the CUDA toolkit (nvcc): {_BUILD}"
    if not torch.cuda.is_available():
        return "no CUDA device"
    left = _left_out()
    if not left or len(left) < len(_gpus()):
        return ""
    if all(gpu < (8, 0) for gpu in left):
        return f"the CUDA kernels need a GPU of compute capability 8.0 or later; here is {_listed(left)}"
    own = ";".join(f"{major}.{minor}" for major, minor in left)
    held = f"the compiled extension fastcnn._C holds CUDA kernels for {', '.join(_images())}, not for {_listed(left)}"
    return f"{held}; build it again: TORCH_CUDA_ARCH_LIST='{own}' {_BUILD}"


def _left_out() -> dict[tuple[int, int], str]:
    """Return the GPUs of this machine that the build has no kernels for."""
    return {gpu: name for gpu, name in _gpus().items() if not any(serves(image, gpu) for image in _images())}


def _listed(gpus: dict[tuple[int, int], str]) -> str:
    return ", ".join(f"{name} ({major}.{minor})" for (major, minor), name in gpus.items())


def _images() -> list[str]:
    return (_built_with()["architectures"] or "").split(":")


def serves(image: str, gpu: tuple[int, int]) -> bool:
    """Tell whether a GPU of a compute capability runs what was built for an architecture, as setup.py names it."""
    found = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", image)
    if found is None:
        return False
    built = int(found[1]), int(found[2])
    if found[3] == "a":  # for no other GPU
        return gpu == built
    return gpu >= built and (gpu[0] == built[0] or (found[3] == "" and found[4] is not None))


@functools.cache
def _gpus() -> dict[tuple[int, int], str]:
    """Return the name of a GPU of each compute capability that is here."""
    try:
        numbers = range(torch.cuda.device_count())
        return {torch.cuda.get_device_capability(i): torch.cuda.get_device_name(i) for i in numbers}
    except RuntimeError:  # as in a forked process, where nobody can ask
        return {}


def _built_with() -> dict[str, str | None]:
    return {} if _EXTENSION_PROBLEM else importlib.import_module("fastcnn._C").built_with()


# Says why a backend is missing, or returns an empty string.
MISSING: dict[str, Callable[[], str]] = {
    "auto": str,
    "torch": str,
    "triton": _triton_missing,
    "cuda": _cuda_missing,
    "cpu": lambda: _EXTENSION_PROBLEM,
}

# The device type that a backend's kernels run on.
RUNS_ON = {"cpu": "cpu", "triton": "cpu" if INTERPRETING else "cuda", "cuda": "cpu" if _PLAYED else "cuda"}


def backends() -> dict[str, BackendStatus]:
    """Tell which backends can run in this process and, where one cannot, why.

    Returns:
        A dict from backend name to its :class:`BackendStatus`, in the order ``auto, torch, triton, cuda, cpu``.

    Example:
        >>> import fastcnn
        >>> [name for name, status in fastcnn.backends().items() if status.available][:2]
        ['auto', 'torch']
    """
    reasons = {name: MISSING[name]() for name in BACKENDS}
    return {name: BackendStatus(not reason, reason, _build(name)) for name, reason in reasons.items()}


def _build(name: str) -> str:
    held = _built_with()
    if name == "cpu" and held:
        return f"{held['compiler']}, torch {held['torch']} or later"
    if name == "cuda" and held.get("cuda"):
        left = _left_out() if torch.cuda.is_available() else {}
        gpus = ", ".join(_images()) + (f", not for {_listed(left)}" if left else "")
        return f"CUDA {held['cuda']} for {gpus}; torch {held['torch']} or later"
    return ""
