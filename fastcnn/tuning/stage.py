"""A stage as it is tried: a call of an op, with the shapes of its tensors, that can be drawn and run again."""

import functools
import importlib
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastcnn.parameters import ACTIVATION, RECORDS, RUNNING, TENSORS
from fastcnn.tuning.call import Operand, key_of

CONSTANTS = {"mean": 0.5, "std": 0.25}  # by which black and white get on the grid
GRID = 16  # inputs on the grid are multiples of one 16th, parameters of one 64th
COARSE = 2  # an LRN's inputs of one half: its sums of squares are exact, and no two results differ by a rounding


@functools.cache
def _planned(op: str) -> Callable[..., Tensor]:
    """Return what runs an op's calls, found by name: ``fastcnn/ops/<stem>.py`` stands above this file."""
    module = importlib.import_module(f"fastcnn.ops.{op}")
    planned: Callable[..., Tensor] = getattr(module, op) if RECORDS[op].normalizes else module.OP.planned
    return planned


def tensors_of(op: str, arguments: tuple[Any, ...]) -> dict[str, Tensor]:
    """Return a call's tensors by name."""
    record = RECORDS[op]
    tensors, named = record.named(*TENSORS), zip(record.names, arguments, strict=True)
    return {name: each for name, each in named if name in tensors and isinstance(each, Tensor)}


class Stage(NamedTuple):
    """A call of an op's function: its tensors, without their data, and its other arguments, by name."""

    op: str
    tensors: dict[str, Operand]
    settings: dict[str, Any]

    @classmethod
    def of(cls, op: str, arguments: tuple[Any, ...]) -> "Stage":
        """Return the stage of a call."""
        given = tensors_of(op, arguments).items()
        tensors = {name: Operand(tuple(t.shape), t.stride(), t.dtype, t.requires_grad) for name, t in given}
        named = zip(RECORDS[op].names, arguments)
        return cls(op, tensors, {name: value for name, value in named if name not in tensors})

    def call(self, tensors: dict[str, Tensor]) -> Tensor:
        """Run the stage on these tensors as eager code has it run, with the backend that is chosen."""
        return _planned(self.op)(*self._arguments(tensors))

    def _arguments(self, tensors: dict[str, Tensor]) -> tuple[Any, ...]:
        given = self.settings | tensors
        if RECORDS[self.op].normalizes:  # what comes out of the normalization is what the weight takes
            given["dtype"] = tensors["weight"].dtype
        return tuple(given[name] for name in RECORDS[self.op].names)

    @property
    def activations(self) -> tuple[str, ...]:
        """Return the names of its activations."""
        return RECORDS[self.op].named(ACTIVATION)

    @property
    def trains(self) -> bool:
        """Return whether a tensor wants a gradient."""
        return any(each.requires_grad for each in self.tensors.values())

    @property
    def by_batch(self) -> bool:
        """Return whether a batch norm takes the statistics of all images together."""
        return self.settings.get("training") is True

    def occurs(self, mode: str) -> bool:
        """Whether it occurs in a mode: ``training`` needs gradients, ``inference`` excludes batch norms in training."""
        return self.trains if mode == "training" else not self.by_batch

    def draw(self, device: torch.device, *, rounded: bool) -> dict[str, Tensor]:
        """Return random tensors like the recorded ones, the same at each call.

        Of normal distribution; `rounded`, from a coarse grid on which sums of products are exact in float32 in any
        order and in TF32: then every algorithm finds the same maxima and the same signs.
        """
        generator = torch.Generator(device).manual_seed(0)
        return {name: self.draw_one(name, generator, rounded=rounded) for name in self.tensors}

    def draw_one(self, name: str, generator: torch.Generator, *, rounded: bool) -> Tensor:
        """Return one of these tensors."""
        like = self.tensors[name]
        values = torch.randn(like.shape, device=generator.device, generator=generator)
        if name in CONSTANTS:
            values = torch.full_like(values, CONSTANTS[name])
        elif like.dtype == torch.uint8:
            values = (values > 0) * 255.0 if rounded else values.mul(64).add(128).clamp(0, 255)
        elif name in RECORDS[self.op].named(RUNNING):
            values = values.abs() + 0.5
        elif name not in self.activations:
            values /= max(math.prod(like.shape[1:]), 16) ** 0.5
        if rounded and like.dtype != torch.uint8:
            step = (COARSE if self.op.startswith("lrn") else GRID) * (1 if name in self.activations else 4)
            values = (values * step).round().clamp(-4 * step, 4 * step) / step
        placed = torch.empty_strided(like.shape, like.strides, dtype=like.dtype, device=values.device).copy_(values)
        return placed.requires_grad_(like.requires_grad)

    def key_in(self, mode: str, device: torch.device) -> dict[str, Any]:
        """Return the key of the entry of a mode, ``inference`` or ``training``."""
        with torch.set_grad_enabled(mode == "training"):
            return key_of(self.op, self._arguments(self.draw(device, rounded=False)))

    def __str__(self) -> str:
        shapes = ["x".join(map(str, self.tensors["input"].shape))]
        if "weight" in self.tensors and not self.op.startswith("bn"):
            shapes.append("x".join(map(str, self.tensors["weight"].shape)))
        frozen, bytes = self.settings.get("training") is False, self.tensors["input"].dtype == torch.uint8
        return " * ".join(shapes) + (", running statistics" if frozen else "") + (", bytes" if bytes else "")
