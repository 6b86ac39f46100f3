"""One stage as work to be timed: its tensors, and the methods that run it."""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastcnn
from benchmarks import roofline
from benchmarks.cells import CONVOLUTIONS, Cell, forced, memory_format
from benchmarks.measure import Work, rotated
from benchmarks.shapes import Stage

Run = Callable[..., Tensor]


class Operation(NamedTuple):
    """How a stage runs: each member makes of it a function of its tensors (see `tensors`)."""

    stock: Callable[[Stage], Run]
    fused: Callable[[Stage], Run]
    cudnn: Callable[[Stage], Run] | None = None


@contextlib.contextmanager
def stage_work(operation: Operation, cell: Cell, device: torch.device) -> Iterator[Work]:
    """Give a function that runs the cell's method once, on the next of the sets of tensors."""
    (stage,) = cell.stages
    item = roofline.ITEM_SIZE[cell.dtype]
    size = roofline.least_bytes([stage], item, training=cell.training)
    if cell.method == "copy":
        yield copy(size, device)
        return
    function, choice = _method(operation, stage, cell.method, device.type)
    sets = rotated(lambda: tensors(stage, cell, device), size, device)
    with choice, torch.set_grad_enabled(cell.training):
        yield _backward(function, sets) if cell.training else lambda: function(*next(sets))


def _method(
    operation: Operation, stage: Stage, method: str, device: str
) -> tuple[Run, contextlib.AbstractContextManager[Any]]:
    """Return the function of a method and the backend to run it under."""
    if method.startswith("fastcnn"):
        backend, algorithm = {"fastcnn": ("auto", None), **forced(device, stage.stem in CONVOLUTIONS)}[method]
        return operation.fused(stage), fastcnn.use_backend(backend, algorithm=algorithm)
    if method.startswith("compile"):
        run, mode = operation.stock(stage), method.removeprefix("compile").strip() or "default"
        return torch.compile(lambda *tensors: run(*tensors), mode=mode, dynamic=False), contextlib.nullcontext()
    if method == "cudnn fused" and operation.cudnn:
        return operation.cudnn(stage), contextlib.nullcontext()
    return operation.stock(stage), contextlib.nullcontext()


def tensors(stage: Stage, cell: Cell, device: torch.device) -> tuple[Tensor, ...]:
    """Return the op's random tensors; where there is a backward, with `requires_grad` as in training."""

    def draw(shape: tuple[int, ...], scale: float, grad: bool, dtype: str = cell.dtype) -> Tensor:
        values = torch.randn(shape, device=device, dtype=getattr(torch, dtype)).mul_(scale)
        if len(shape) == 4:
            values = values.contiguous(memory_format=memory_format(cell.layout))
        return values.requires_grad_(grad and cell.training)

    if stage.bytes:
        pixels = torch.randint(256, stage.input, dtype=torch.uint8, device=device)
        constants = (torch.full(stage.input[1:2], value, device=device) for value in (0.5, 0.25))
        images = pixels.contiguous(memory_format=memory_format(cell.layout)), *constants
        if stage.weight is None:
            return *images, torch.empty(0, dtype=getattr(torch, cell.dtype), device=device)  # the output's dtype
        return *images, *_parameters(stage, draw)
    input = draw(stage.input, 1.0, grad=not stage.first)
    if stage.stem == "add_relu":
        return input, draw(stage.input, 1.0, grad=True)
    if stage.batch_norm:
        channels = stage.input[1:2]
        running = torch.zeros(channels, device=device), torch.ones(channels, device=device)
        parameters = (draw(channels, 1.0, grad=True, dtype="float32") for _ in range(2))  # as under autocast
        return input, *running, *parameters
    if stage.weight is None:
        return (input,)
    return input, *_parameters(stage, draw)


def _parameters(stage: Stage, draw: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
    assert stage.weight
    fan_in = torch.Size(stage.weight[1:]).numel()
    return draw(stage.weight, fan_in**-0.5, grad=True), draw(stage.weight[:1], 1.0, grad=True)


def _backward(function: Run, sets: Iterator[tuple[Tensor, ...]]) -> Work:
    first = next(sets)
    gradient = torch.randn_like(function(*first).detach())
    rest = itertools.chain([first], sets)

    def step() -> object:
        each = next(rest)
        leaves = [tensor for tensor in each if tensor.requires_grad]
        return torch.autograd.grad(function(*each), leaves, gradient)

    return step


def copy(size: int, device: torch.device) -> Work:
    """Return a copy that reads half of `size` bytes and writes as many."""

    def pair() -> tuple[Tensor, Tensor]:
        source = torch.randint(0, 255, (max(1, size // 2),), dtype=torch.uint8, device=device)
        return torch.empty_like(source), source

    pairs = rotated(pair, size, device)

    def step() -> object:
        target, source = next(pairs)
        return target.copy_(source)

    return step
