"""The stages of a model: every call of a fused function in one pass, with the shapes of its tensors."""

import inspect
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn

from fastcnn import functional as FF
from fastcnn import stages as joined_stages
from fastcnn.backend import use_backend
from fastcnn.tuning.call import Operand, call_of, describe, setting_of

OPS = {  # by the name of the function
    "add_relu": "add_relu",
    "batch_norm_relu": "bn_relu",
    "batch_norm_relu_max_pool2d": "bn_relu_pool",
    "conv2d_relu": "conv_relu",
    "conv2d_relu_max_pool2d": "conv_relu_pool",
    "linear_relu": "linear_relu",
    "local_response_norm": "lrn",
    "local_response_norm_max_pool2d": "lrn_pool",
    "max_pool2d": "max_pool",
}
JOINED = ("normalize_conv_relu", "normalize_conv_relu_pool")  # functions of `fastcnn.stages`, by the name of the op
RUNNING = ("running_mean", "running_var")  # which a call in training updates
ACTIVATIONS = ("input", "other")
CONSTANTS = {"mean": 0.5, "std": 0.25}  # by which black and white get on the grid
TENSORS = (*ACTIVATIONS, "weight", "bias", *RUNNING, *CONSTANTS)
GRID = 16  # inputs on the grid are multiples of one 16th, parameters of one 64th
COARSE = 2  # an LRN's inputs of one half: its sums of squares are exact, and no two results differ by a rounding


class Stage(NamedTuple):
    """A call of a function of ``fastcnn.functional``, or of `JOINED`.

    `tensors` are those of the recorded call, without their data.
    """

    op: str
    function: str
    tensors: dict[str, Operand]
    settings: dict[str, Any]

    def call(self, tensors: dict[str, Tensor]) -> Tensor:
        """Run the stage on these tensors, with the backend that is chosen."""
        settings = self.settings
        if self.op in JOINED:  # what comes out of the normalisation is what the weight takes
            settings = {**settings, "dtype": tensors["weight"].dtype}
        return _function(self.function)(**tensors, **settings)

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype that it computes in: that of its input, or for images that it normalises the weight's."""
        return self.tensors["weight" if self.op in JOINED else "input"].dtype

    @property
    def trains(self) -> bool:
        """Return whether a tensor wants a gradient."""
        return any(each.requires_grad for each in self.tensors.values())

    @property
    def by_batch(self) -> bool:
        """Return whether a batch norm takes the statistics of all images together."""
        return self.settings.get("training") is True

    def draw(self, device: torch.device, *, rounded: bool) -> dict[str, Tensor]:
        """Return random tensors like the recorded ones, the same at each call.

        Args:
            device: where they are.
            rounded: draw them from a coarse grid, on which sums of products are exact in float32 in any order and in
                TF32: then every algorithm finds the same maxima and the same signs. Else of normal distribution.
        """
        generator = torch.Generator(device).manual_seed(0)
        return {name: self._draw(name, like, generator, rounded) for name, like in self.tensors.items()}

    def _draw(self, name: str, like: Operand, generator: torch.Generator, rounded: bool) -> Tensor:
        values = torch.randn(like.shape, device=generator.device, generator=generator)
        if name in CONSTANTS:
            values = torch.full_like(values, CONSTANTS[name])
        elif like.dtype == torch.uint8:
            values = (values > 0) * 255.0 if rounded else values.mul(64).add(128).clamp(0, 255)
        elif name in RUNNING:
            values = values.abs() + 0.5
        elif name not in ACTIVATIONS:
            values /= max(math.prod(like.shape[1:]), 16) ** 0.5
        if rounded and like.dtype != torch.uint8:
            step = (COARSE if self.op.startswith("lrn") else GRID) * (1 if name in ACTIVATIONS else 4)
            values = (values * step).round().clamp(-4 * step, 4 * step) / step
        placed = torch.empty_strided(like.shape, like.strides, dtype=like.dtype, device=values.device).copy_(values)
        return placed.requires_grad_(like.requires_grad)

    def another(self, input: Tensor) -> Tensor:
        """Return other random values like an input's."""
        if input.dtype == torch.uint8:
            return torch.randint_like(input, 256)
        return torch.randn_like(input, requires_grad=input.requires_grad)

    def key(self, tensors: dict[str, Tensor], *, training: bool) -> dict[str, Any]:
        """Return the key of the entry of a call with these tensors."""
        order = inspect.signature(_function(self.function)).parameters
        arguments = tuple(tensors[name] if name in tensors else self.settings[name] for name in order)
        with torch.set_grad_enabled(training):
            return describe(call_of(self.op, arguments, setting_of(self.op, tensors["input"].device.type)))

    def key_in(self, mode: str, device: torch.device) -> dict[str, Any]:
        """Return the key of the entry of a mode, ``inference`` or ``training``."""
        return self.key(self.draw(device, rounded=False), training=mode == "training")

    def __str__(self) -> str:
        shapes = ["x".join(map(str, self.tensors["input"].shape))]
        if "weight" in self.tensors and not self.op.startswith("bn"):
            shapes.append("x".join(map(str, self.tensors["weight"].shape)))
        frozen, bytes = self.settings.get("training") is False, self.tensors["input"].dtype == torch.uint8
        return " * ".join(shapes) + (", running statistics" if frozen else "") + (", bytes" if bytes else "")


def _function(name: str) -> Callable[..., Tensor]:
    function: Callable[..., Tensor] = getattr(joined_stages if name in JOINED else FF, name)
    return function


def stages_of(model: nn.Module, input: Tensor) -> list[Stage]:
    """Return the stages that a model runs on an input, each once.

    The model runs on the stock layers, so that shapes and layouts are those that training and inference will see: once
    as it is, and once in evaluation where batch norms do something else there. Its buffers and modes stay.

    Example:
        >>> import torch, fastcnn
        >>> [stage.op for stage in stages_of(fastcnn.MnistCNN(), torch.randn(8, 1, 28, 28))]
        ['conv_relu_pool', 'conv_relu_pool', 'linear_relu']
    """
    seen: dict[str, Stage] = {}
    # Nobody asks for the gradient of this pass, so what it would save is dropped.
    saves_nothing = torch.autograd.graph.saved_tensors_hooks(lambda _: None, lambda nothing: nothing)
    with use_backend("torch"), torch.enable_grad(), saves_nothing, _recorder(seen), _left_as_it_is(model):
        model(input)
        if any(stage.by_batch for stage in seen.values()):
            model.eval()(input)
    return list(seen.values())


@contextmanager
def _left_as_it_is(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


@contextmanager
def _recorder(seen: dict[str, Stage]) -> Iterator[None]:
    """Note each call of a public function, by name as a stage looks it up or from another function of its file."""
    with ExitStack() as stack:
        for name, op in {**OPS, **{each: each for each in JOINED}}.items():
            function = _function(name)
            for module in {joined_stages if name in JOINED else FF, sys.modules[function.__module__]}:
                stack.enter_context(patch.object(module, name, _recording(op, name, function, seen)))
        yield


def _recording(op: str, name: str, function: Callable[..., Any], seen: dict[str, Stage]) -> Callable[..., Any]:
    signature = inspect.signature(function)

    def record(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        tensors = {key: bound.arguments[key] for key in TENSORS if isinstance(bound.arguments.get(key), Tensor)}
        settings = {key: value for key, value in bound.arguments.items() if key not in tensors}
        kept = {
            key: Operand(tuple(each.shape), each.stride(), each.dtype, each.requires_grad)
            for key, each in tensors.items()
        }
        seen.setdefault(str((op, settings, kept)), Stage(op, name, kept, settings))
        return function(*args, **kwargs)

    return record
