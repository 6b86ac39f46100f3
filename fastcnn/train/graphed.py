"""A whole training step as one CUDA graph: one launch instead of hundreds."""

import contextlib
import functools
import logging
import warnings
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.optim import Optimizer

logger = logging.getLogger("fastcnn")

WARM_UP_CALLS = 3  # as torch's documentation on CUDA graphs advises
MAX_GRAPHS = 16  # each holds memory of its own; a loop with more kinds of calls rarely repeats one


class GraphedStep:
    """Runs a training step as usual a few times, then captures it into a CUDA graph and replays that.

    The step stays the user's own function: it may hold forward, loss, backward, gradient clipping, a GradScaler and
    the optimizer, or several steps in a row. Its first calls are ordinary steps of the training, run on a side stream
    as capture needs it; so nothing has to be undone. Losses are those of the ungraphed step, dropout included. Each
    shape of the inputs (the last, smaller batch) gets a graph of its own, and so does each setting of the optimizer.

    A step that cannot be captured runs ungraphed, with a warning in the log ``fastcnn`` that says why: its tensors are
    not all on one GPU, it waits for the GPU (``.item()``, ``.cpu()``, ``if tensor``, ``nonzero``, boolean masks), its
    optimizer keeps state on the CPU, or the capture fails. Nothing of the training is lost then.

    What Python decides is decided once, at capture: ``train()`` or ``eval()``, the backend, a branch, a hook. Call
    :meth:`reset` after changing such a thing. Loading the optimizer's state resets by itself.

    Args:
        step: takes tensors and returns one, usually the loss, without waiting for the GPU. Autocast belongs inside.
        optimizer: the one that ``step`` steps; None where it only evaluates. On a GPU it is made capturable
            (:func:`make_capturable`): its learning rates become tensors, which schedulers of ``torch.optim`` fill.
            Where the optimizer is neither fused nor capturable (SGD without ``fused=True``) they stay numbers, and
            each new one means a new capture.

    Attributes:
        reason: why calls run ungraphed; empty while they are captured.

    Example:
        >>> import torch
        >>> import torch.nn.functional as F
        >>> import fastcnn
        >>> from fastcnn.train import GraphedStep
        >>> model = fastcnn.MnistCNN()  # .cuda(), and the batches too: on the CPU the step runs ungraphed
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, fused=True)
        >>> def train_step(images, labels):
        ...     optimizer.zero_grad()
        ...     loss = F.cross_entropy(model(images), labels)
        ...     loss.backward()
        ...     optimizer.step()
        ...     return loss
        >>> step = GraphedStep(train_step, optimizer)
        >>> loss = step(torch.randn(8, 1, 28, 28), torch.arange(8))  # stays on the device: read it rarely
        >>> step.reason
        'its tensors are on cpu; a CUDA graph needs all of them on one GPU'
    """

    def __init__(self, step: Callable[..., Tensor], optimizer: Optimizer | None = None) -> None:
        self._step, self._optimizer = step, optimizer
        self.reset()
        if optimizer is not None:
            # Loading replaces the tensors of the state, and a graph would go on with the old ones.
            optimizer.register_load_state_dict_post_hook(lambda _: self.reset())

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Run the step and return its result, detached; it is the caller's own, not a buffer of the graph."""
        if self.reason:
            return self._step(*inputs).detach()
        key = self._key(inputs)
        graph = self._graphs.get(key)
        return self._first_calls(key, inputs) if graph is None else graph(*inputs)

    def reset(self) -> None:
        """Drop the graphs, so that the next calls warm up and capture again."""
        self.reason = ""
        self._calls: dict[Hashable, int] = {}
        self._graphs: dict[Hashable, Callable[..., Tensor]] = {}
        self._capture: CudaCapture | None = None
        if self._optimizer is not None:
            make_capturable(self._optimizer)

    def _key(self, inputs: tuple[Tensor, ...]) -> Hashable:
        """Return what a graph depends on: shapes, dtypes, settings; tensors among the settings by identity."""
        groups = self._optimizer.param_groups if self._optimizer else []
        settings = (value for group in groups for name, value in group.items() if name != "params")
        return (
            *((input.shape, input.dtype) for input in inputs),
            *(str(value) if isinstance(value, list) else value for value in settings),
        )

    def _first_calls(self, key: Hashable, inputs: tuple[Tensor, ...]) -> Tensor:
        self._calls[key] = calls = self._calls.get(key, 0) + 1
        run = functools.partial(self._step, *inputs)
        capture = self._capture_for(inputs)
        if capture is None:
            return run().detach()
        if calls <= WARM_UP_CALLS:
            output, waits = capture.warm_up(run)
            if waits and calls == WARM_UP_CALLS:  # earlier calls may wait while they set things up
                self._give_up(f"it makes the CPU wait for the GPU ({waits[0]})")
            return output.detach()
        try:
            self._graphs[key] = graph = self._record(capture, inputs)
        except Exception as error:  # the user's step may raise anything
            cause = error.__context__ or error  # ending a broken capture fails too, with less to say
            first_line, *_ = str(cause).splitlines() or [type(cause).__name__]
            self._give_up(f"capturing it failed ({first_line})")
            return run().detach()
        return graph(*inputs)

    def _capture_for(self, inputs: tuple[Tensor, ...]) -> "CudaCapture | None":
        devices = {tensor.device for tensor in (*inputs, *_parameters(self._optimizer))}
        if len(self._calls) > MAX_GRAPHS:
            self._give_up(
                f"it was called with more than {MAX_GRAPHS} different shapes or settings of the optimizer; "
                "a learning rate that changes should be a tensor that is filled in place"
            )
        elif len(devices) != 1 or not {device.type for device in devices} <= CAPTURES.keys():
            names = " and ".join(sorted(map(str, devices)))
            self._give_up(f"its tensors are on {names}; a CUDA graph needs all of them on one GPU")
        elif self._capture is None:
            (device,) = devices
            self._capture = CAPTURES[device.type](device)
        return None if self.reason else self._capture

    def _record(self, capture: "CudaCapture", inputs: tuple[Tensor, ...]) -> Callable[..., Tensor]:
        buffers = tuple(input.detach().clone() for input in inputs)
        with _state_kept(self._optimizer):
            replay, result = capture.record(functools.partial(self._step, *buffers))
        output = result.detach()

        def graph(*inputs: Tensor) -> Tensor:
            for buffer, input in zip(buffers, inputs):
                buffer.copy_(input)
            replay()
            return output.clone()

        return graph

    def _give_up(self, reason: str) -> None:
        self.reason = reason
        self._graphs.clear()
        logger.warning("a step runs without a CUDA graph: %s", reason)


class CudaCapture:
    """How a function is warmed up and captured on one GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()  # shared: graphs of one step never run at the same time

    def warm_up(self, function: Callable[[], Tensor]) -> tuple[Tensor, list[str]]:
        """Run a function on the side stream; return its result, and the places where it waited for the GPU."""
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream), _waits() as waits:
            output = function()
        current.wait_stream(self.stream)
        return output, waits

    def record(self, function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """Capture a function without running it; return what replays it, and the buffer of its result."""
        graph = torch.cuda.CUDAGraph()
        try:
            # The outer context brings the current stream back should ending the capture fail. Other threads, such as
            # one that pins memory for a DataLoader, may go on working.
            with (
                torch.cuda.stream(self.stream),
                torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"),
            ):
                output = function()
        except BaseException:  # a failed capture leaves open the allocator's pool and the generator's capture mode
            with contextlib.suppress(RuntimeError):  # the failure was an earlier one, and the pool is closed
                torch._C._cuda_endAllocateToPool(self.device.index, self.pool)
            graph.reset()
            _FAILED.append(graph)
            # torch 2.11 leaves the random generator in capture mode until a capture ends well.
            with torch.cuda.stream(self.stream), torch.cuda.graph(torch.cuda.CUDAGraph(), stream=self.stream):
                torch.zeros((), device=self.device)
            raise
        return graph.replay, output


CAPTURES: dict[str, Callable[[torch.device], CudaCapture]] = {"cuda": CudaCapture}
# torch's allocator may still ask these whether they are capturing, so they outlive their failure.
_FAILED: list[torch.cuda.CUDAGraph] = []


def make_capturable(optimizer: Optimizer) -> None:
    """Let an optimizer whose parameters are on a GPU be captured; elsewhere it stays as it is.

    ``capturable`` is set where the optimizer knows it, with the step counts moved to the GPU. Learning rates of
    capturable and fused optimizers become tensors there, so that a captured step reads their current value.
    """
    for group in optimizer.param_groups:
        device = group["params"][0].device
        if device.type not in CAPTURES:
            continue
        if "capturable" in group:
            group["capturable"] = True
            for state in (optimizer.state[parameter] for parameter in group["params"] if parameter in optimizer.state):
                if isinstance(state.get("step"), Tensor):
                    state["step"] = state["step"].to(device, torch.float32)
        if group.get("capturable") or group.get("fused"):
            group["lr"] = torch.as_tensor(group["lr"], dtype=torch.float32, device=device)


def _parameters(optimizer: Optimizer | None) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]] if optimizer else []


@contextlib.contextmanager
def _state_kept(optimizer: Optimizer | None) -> Iterator[None]:
    """Allow a capture only in-place updates of the optimizer's state; restore gradients and state if it fails.

    A capture runs no kernel, so parameters and random streams stand still. But it leaves new tensors as gradients, and
    whatever it creates as state would hold nothing.
    """
    parameters = _parameters(optimizer)
    gradients = [parameter.grad for parameter in parameters]
    state = {parameter: dict(values) for parameter, values in optimizer.state.items()} if optimizer else {}
    try:
        for parameter, values in state.items():
            for name, value in values.items():
                if isinstance(value, int | float) or (isinstance(value, Tensor) and value.device != parameter.device):
                    where = "outside the GPU, where a graph cannot update it"
                    raise RuntimeError(f"{type(optimizer).__name__} keeps {name!r} {where}")
        yield
        if optimizer and any(
            state.get(parameter, {}).get(name) is not value
            for parameter, values in optimizer.state.items()
            for name, value in values.items()
        ):
            raise RuntimeError(f"{type(optimizer).__name__} makes new state in a step instead of updating it in place")
    except BaseException:
        for parameter, gradient in zip(parameters, gradients):
            parameter.grad = gradient
        if optimizer:
            optimizer.state.clear()
            optimizer.state.update(state)
        raise


@contextlib.contextmanager
def _waits() -> Iterator[list[str]]:
    """Collect the places where the CPU waits for the GPU."""
    places: list[str] = []
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield places
        finally:
            torch.cuda.set_sync_debug_mode(before)
    for each in caught:
        if "synchronizing" in str(each.message):
            places.append(f"{Path(each.filename).name}, line {each.lineno}")
        else:
            warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)
