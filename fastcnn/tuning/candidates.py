"""What may run a stage on a device: stock torch, and every algorithm and configuration of every backend there."""

from collections.abc import Iterator

import torch

from fastcnn.available import backends
from fastcnn.backend import ALGORITHMS, GRADIENTS, JOINED, configurations
from fastcnn.tuning.table import Winner

STOCK = Winner("torch", None)
ON = {"cpu": ("cpu",), "cuda": ("triton", "cuda")}  # Triton's interpreter on the CPU is for tests: never timed


def candidates(op: str, device: torch.device, only: str | None = None) -> list[Winner]:
    """Return what can be timed for an op, stock torch first; `only` leaves out the other backends' kernels."""
    held = backends()
    names = [name for name in ON.get(device.type, ()) if held[name].available and only in (None, name)]
    return [STOCK, *(Winner(name, algorithm) for name in names for algorithm in _algorithms(op, name))]


def light(op: str, device: torch.device) -> list[Winner]:
    """Return what a trial takes for an op: kernels that are compiled already, or within a second.

    First layers', Hopper's and tiled algorithms are for ``fastcnn tune``, and so are our own dgrad and wgrad.
    """
    light = (None, "epilogue", "implicit_gemm")  # the last of cuda; Triton's has configurations
    return [each for each in candidates(op, device)[1:] if each.algorithm in light]


def _algorithms(op: str, name: str) -> Iterator[str | None]:
    joined = op.startswith("normalize")
    if not (joined or op.startswith("conv")):
        yield None
        return
    able = [each for each, backends in (JOINED if joined else ALGORITHMS).items() if name in backends]
    for algorithm in able:
        yield from [f"{algorithm}:{each}" for each in configurations(name, algorithm)] or [algorithm]
    gradients = [] if joined else [kind for kind, backends in GRADIENTS.items() if name in backends]
    if gradients:  # all that the backend has with every algorithm,
        yield from ("+".join([algorithm, *gradients]) for algorithm in able)
    for kind in gradients:  # and each configuration by itself, after the one algorithm that serves every shape
        yield from (f"epilogue+{kind}:{each}" for each in configurations(name, kind))
