"""What may run a stage on a device: stock torch, and every algorithm and configuration of every backend there."""

from collections.abc import Iterator

import torch

from fastcnn.algorithms import ALGORITHMS, GRADIENTS, JOINED
from fastcnn.available import backends
from fastcnn.backend import configurations
from fastcnn.tuning.table import Winner

STOCK = Winner("torch", None)
TOO_NOISY = "measured on this device: too noisy to tell, stock kept"
ON = {"cpu": ("cpu",), "cuda": ("triton", "cuda")}  # Triton's interpreter on the CPU is for tests: never timed


def candidates(op: str, device: torch.device, only: str | None = None) -> list[Winner]:
    """Return what can be timed for an op, stock torch first.

    Args:
        op: its stem.
        device: where it runs.
        only: leave out the other backends' kernels.

    Example:
        >>> candidates("lrn", torch.device("cpu"), only="torch")
        [Winner(backend='torch', algorithm=None)]
    """
    held = backends()
    names = [name for name in ON.get(device.type, ()) if held[name].available and only in (None, name)]
    return [STOCK, *(Winner(name, algorithm) for name in names for algorithm in _algorithms(op, name))]


def light(op: str, device: torch.device) -> list[Winner]:
    """Return what a trial takes for an op: kernels that are compiled already, or within a second.

    First layers', Hopper's and tiled algorithms are for ``fastcnn tune``, and so are our own dgrad and wgrad.

    Example:
        >>> light("normalize_conv_relu", torch.device("cpu"))
        []
    """
    return [each for each in candidates(op, device) if each != STOCK and each.algorithm in _LIGHT[each.backend]]


_LIGHT: dict[str, tuple[str | None, ...]] = {
    "cpu": (None, "epilogue"),
    "triton": (None, "epilogue"),
    "cuda": (None, "epilogue", "implicit_gemm"),
}


def _algorithms(op: str, name: str) -> list[str | None]:
    joined = op.startswith("normalize")
    if not (joined or op.startswith("conv")):
        return [None]
    found: list[str | None] = []
    for algorithm, able in (JOINED if joined else ALGORITHMS).items():
        if name in able:
            held = configurations(name, algorithm)
            found += [f"{algorithm}:{each}" for each in held] or [algorithm]
    return found if joined else [*found, *_with_gradients(name)]


def _with_gradients(name: str) -> Iterator[str]:
    """Give every algorithm with all the gradients that a backend has, and each configuration of these by itself."""
    held = [kind for kind, able in GRADIENTS.items() if name in able]
    if held:
        yield from ("+".join([algorithm, *held]) for algorithm, able in ALGORITHMS.items() if name in able)
    for kind in held:  # after the one algorithm that serves every shape
        yield from (f"epilogue+{kind}:{each}" for each in configurations(name, kind))


def differs(candidate: Winner, mode: str) -> bool:
    """Whether a candidate runs something of its own in a mode: gradients are nothing to inference."""
    return mode == "training" or "+" not in (candidate.algorithm or "")
