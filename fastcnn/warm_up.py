"""The stages of a model, and running their trials in advance."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastcnn.backend import only_here
from fastcnn.parameters import RECORDS
from fastcnn.route import Route, listening
from fastcnn.tuning import trial
from fastcnn.tuning.stage import Stage


def stages_of(model: nn.Module, input: Tensor) -> list[Stage]:
    """Return the stages that a model runs on an input, each once.

    The model runs on the stock layers, so that shapes and layouts are those of training and inference: once as it is,
    and once more in evaluation if it has batch norms in training. Its buffers and modes stay.
    """
    seen: dict[str, Stage] = {}

    def note(op: str, arguments: tuple[Any, ...], route: Route) -> None:
        if op in RECORDS and RECORDS[op].tuned and isinstance(arguments[0], Tensor):
            stage = Stage.of(op, arguments)
            seen.setdefault(repr(stage), stage)

    # This pass has no backward, so tensors that it would save are dropped.
    saves_nothing = torch.autograd.graph.saved_tensors_hooks(lambda _: None, lambda nothing: nothing)
    with only_here("torch"), torch.enable_grad(), saves_nothing, listening(note), _left_as_it_is(model, input):
        model(input)
        if any(stage.by_batch for stage in seen.values()):
            model.eval()(input)
    return list(seen.values())


def warm_up(model: nn.Module, input: Tensor) -> nn.Module:
    """Run the trials of a model's stages that no table covers, as their first eager calls would; return the model.

    Call it before ``torch.compile``, whose graphs only read the tables, before a CUDA graph is captured, or before a
    server takes requests. A model in training mode is tried in training and inference, one in evaluation mode in
    inference only, under the autocast around this call. The model and torch's random numbers stay unchanged. Under
    ``FASTCNN_TRIAL=0``, and on the CPU unless it is 1, this does nothing.

    Args:
        model: any network that runs through fastcnn.
        input: an example input of the batch size, dtype and layout that will be used.

    Raises:
        TypeError: `input` is not a tensor.

    Example:
        >>> import torch, fastcnn
        >>> model = fastcnn.warm_up(fastcnn.MnistCNN(), torch.randn(8, 1, 28, 28))
    """
    if not isinstance(input, Tensor):
        raise TypeError(f"warm_up: argument 'input': expected a Tensor, got {type(input).__name__}")
    if not trial.concerns(input):
        return model
    for stage in stages_of(model, input):
        for mode in ("training", "inference") if model.training else ("inference",):
            if stage.occurs(mode):
                with only_here("auto"), torch.set_grad_enabled(mode == "training"):
                    stage.call(stage.draw(input.device, rounded=False))
    return model


@contextmanager
def _left_as_it_is(model: nn.Module, input: Tensor) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        with torch.random.fork_rng([input.device] if input.is_cuda else []):
            yield
    finally:
        for module, training in modes:
            module.training = training
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
