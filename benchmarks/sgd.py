"""A step of SGD with momentum and weight decay on AlexNet's parameters, by torch's optimizer and by fastcnn's.

In half precision the parameters are the shadows of float32 masters. Torch's optimizer, which knows none, is given the
masters: gradients are copied to them before its step, and they into the shadows after it.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import fastcnn
from benchmarks import roofline
from benchmarks.cells import Cell, forced
from benchmarks.measure import Work
from benchmarks.shapes import ENTRIES
from benchmarks.work import copy

SETTINGS: dict[str, Any] = {"lr": 1e-9, "momentum": 0.9, "weight_decay": 5e-4}  # timing it leaves the weights alone


@contextlib.contextmanager
def sgd_work(cell: Cell, device: torch.device) -> Iterator[Work]:
    """Give a step of the cell's method: `eager` is torch's foreach, `fused` torch's one kernel over all parameters."""
    if cell.method == "copy":
        item = roofline.ITEM_SIZE[cell.dtype]
        yield copy(roofline.least_bytes(cell.stages, item, training=False), device)
        return
    with device:
        parameters = list(ENTRIES[cell.stages[0].model].build().to(getattr(torch, cell.dtype)).parameters())
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    if cell.method.startswith("fastcnn"):
        backend, _ = {"fastcnn": ("auto", None), **forced(device.type, convolutions=False)}[cell.method]
        with fastcnn.use_backend(backend):
            yield fastcnn.optim.SGD(parameters, **SETTINGS).step
    else:
        yield stock(parameters, fused=cell.method == "fused")


def stock(parameters: list[torch.nn.Parameter], *, fused: bool) -> Work:
    """Return a step of torch's optimizer, with casts where the parameters are in half precision."""
    if parameters[0].dtype == torch.float32:
        return torch.optim.SGD(parameters, **SETTINGS, fused=fused, foreach=not fused).step
    shadows: list[Tensor] = [parameter.detach() for parameter in parameters]
    masters = [shadow.float().requires_grad_() for shadow in shadows]
    for master in masters:
        master.grad = torch.empty_like(master)
    gradients: Any = [parameter.grad for parameter in parameters], [master.grad for master in masters]
    optimizer = torch.optim.SGD(masters, **SETTINGS, fused=fused, foreach=not fused)

    def step() -> None:
        torch._foreach_copy_(gradients[1], gradients[0])
        optimizer.step()
        torch._foreach_copy_(shadows, [master.detach() for master in masters])

    return step
