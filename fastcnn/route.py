"""The route of a call: which backend runs it, by which algorithm, and why. `listening` reports every route."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastcnn import front, overrides, tuning
from fastcnn.available import KERNEL_BACKENDS, MISSING, RUNS_ON
from fastcnn.backend import choice, device_type, tables_changed, unusable
from fastcnn.parameters import RECORDS, TENSORS
from fastcnn.tuning import trial

logger = logging.getLogger("fastcnn")


class Route(NamedTuple):
    """What runs a call: ``torch`` or the backend of a kernel, its algorithm where it has several, and why."""

    backend: str
    algorithm: str | None
    reason: str

    def __str__(self) -> str:
        return self.backend if self.algorithm is None else f"{self.backend} {self.algorithm}"


ASKED_FOR = "the backend asked for"
MEASURED_STOCK = "measured on this device{}: stock was faster"
MEASURED_KERNEL = "measured on this device{}: the fastest"
MEASURED_KIND = "faster from this size on, as measured on this kind of device"
STOCK_ON_THIS_KIND = "stock is as fast, as measured on this kind of device"
TOO_SMALL = "below the size from which it pays"
UNMEASURED = "not measured for this shape"

# Called with the op's stem, its function's arguments and the route; never while torch.compile traces.
Listener = Callable[[str, tuple[Any, ...], Route], None]
_listeners: list[Listener] = []


class Fastest(NamedTuple):
    """Where a backend has been measured to beat the stock layers.

    By layout: from how many elements of the input on, where no gradient is asked for and where one is.
    """

    backend: str
    dtypes: tuple[torch.dtype, ...]
    nchw: tuple[int, int] = (0, 0)
    channels_last: tuple[int, int] = (0, 0)
    without_front: int = 0  # the least without the front: the Python path costs more than a small kernel saves

    def least(self, arguments: tuple[Any, ...]) -> int:
        """Return how many elements the input must have, by its layout and whether a gradient is asked for."""
        least = self.nchw if arguments[0].is_contiguous() else self.channels_last
        asked = torch.is_grad_enabled() and any(isinstance(each, Tensor) and each.requires_grad for each in arguments)
        values, gradients = least  # torch 2.11 compiles no tuple indexed by a bool
        return max(gradients if asked else values, self.without_front if front.problem else 0)


# What `auto` takes for an op on a device type if no table has the call. An entry needs parity and a time measured on
# such a device against stock torch; without an entry `auto` runs the stock layers.
# CPU, by benchmarks/results/cpu/*.jsonl and the table in benchmarks/NOTES.md: conv_relu and linear_relu run stock, as
# torch computes their matrix product either way; add_relu and folding a batch norm into its convolution (conv_bn) save
# less than the noise; to make indices of a max-pool's codes (max_pool_indices) costs more than the pool; a small
# max-pool with a gradient is as fast in stock. In bfloat16 torch has no LRN on the CPU outside autocast.
STOCK_IS_AS_FAST = {("cpu", each) for each in ("add_relu", "conv_bn", "conv_relu", "linear_relu", "max_pool_indices")}
_NARROW = torch.float32, torch.bfloat16
FASTEST: dict[tuple[str, str], Fastest] = {
    ("cpu", "bn_relu"): Fastest("cpu", _NARROW, without_front=2**18),
    ("cpu", "bn_relu_pool"): Fastest("cpu", _NARROW, without_front=2**18),
    ("cpu", "conv_relu_pool"): Fastest("cpu", _NARROW, without_front=3 * 2**14),
    ("cpu", "lrn"): Fastest("cpu", _NARROW),
    ("cpu", "lrn_pool"): Fastest("cpu", _NARROW),
    ("cpu", "max_pool"): Fastest("cpu", _NARROW, (0, 2**15), (0, 2**17), without_front=2**17),
}


def choose(
    op: str,
    function: str,
    arguments: tuple[Any, ...],
    prepare: Callable[..., Any],
    refuse: Callable[..., str],
    measured: str = "",
) -> tuple[Route, Any]:
    """Return what runs a call, and what `prepare` returned, if it was called: under ``torch`` torch checks arguments.

    Raises RuntimeError where an explicit backend cannot serve the call.

    Args:
        op: the op's stem.
        function: the public function's name, for messages.
        arguments: the function's, by position; the first is the input.
        prepare: checks the arguments, and returns a tuple of what kernels take, the input first, after autocast.
        refuse: says of that tuple why no kernel of any backend serves it, or returns an empty string.
        measured: the name in `FASTEST`, where it is not the op's.
    """
    wanted = choice()
    prepared = None
    if wanted.problem:
        raise RuntimeError(wanted.problem)
    if wanted.backend == "torch":
        route = Route("torch", None, ASKED_FOR)
    elif wanted.backend == "auto":
        route, prepared = _fastest(op, function, arguments, prepare, refuse, measured or op)
    elif wanted.backend not in _having(op):
        route = Route("torch", None, f"backend {wanted.backend!r} has no kernel of it")
    elif reason := overrides.lacks_rule(arguments):
        raise RuntimeError(f"{function}: backend {wanted.backend!r} {reason}; backend 'torch' has")
    else:
        prepared = prepare(*arguments)
        if reason := _unfit(wanted.backend, wanted.algorithm, prepared[0]) or refuse(*prepared):
            raise RuntimeError(f"{function}: backend {wanted.backend!r} {reason}")
        route = Route(wanted.backend, wanted.algorithm, ASKED_FOR)
    if _listeners and not torch.compiler.is_compiling():
        for listen in _listeners:
            listen(op, arguments, route)
    return route, prepared


def is_open(op: str, input: Tensor) -> bool:
    """Whether the route of an op that no table has may be a kernel's under `auto`, or somebody listens to it."""
    return (device_type(input), op) in FASTEST or bool(_listeners)


def _joins(op: str) -> bool:
    """Whether `auto` takes an op only by a table entry; without one, two stages run one after another."""
    return op in RECORDS and RECORDS[op].normalizes


def _having(op: str) -> tuple[str, ...]:
    """Return the backends that have kernels of an op; under the others torch's operations run, as for any layer."""
    if op == "sgd":
        return ("triton",)
    return KERNEL_BACKENDS if op not in RECORDS or _joins(op) else RECORDS[op].backends


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """While the block runs, call `listener` with every route; plans are dropped, so that all calls are routed anew."""
    _listeners.append(listener)
    tables_changed()
    try:
        with front.aside():
            yield
    finally:
        _listeners.remove(listener)


def _fastest(
    op: str, function: str, arguments: tuple[Any, ...], prepare: Callable[..., Any], refuse: Any, measured: str
) -> tuple[Route, Any]:
    input = arguments[0]
    if not isinstance(input, Tensor):
        return Route("torch", None, "the input is not a tensor"), None
    reason = overrides.lacks_rule(arguments) or overrides.watcher(arguments)
    if not reason and input.layout is not torch.strided:
        reason = f"no kernel takes {input.layout}"
    if reason:
        _say_stock(function, reason, device_type(input))
        return Route("torch", None, reason), None
    found, why = _measured(op, arguments)
    at = f" at batch {found.batch}" if found and found.batch else ""
    if found is None:
        route = _by_kind_of_device(measured, arguments, why)
    elif found.winner.backend == "torch":
        route = Route("torch", None, found.why or MEASURED_STOCK.format(at))
    else:
        route = Route(*found.winner, MEASURED_KERNEL.format(at))
    prepared = None
    if route.backend != "torch":
        prepared = prepare(*arguments)
        taken = prepared[0]
        entry = FASTEST.get((device_type(input), measured))
        if reason := _unfit(route.backend, route.algorithm, taken) or refuse(*prepared):
            route = Route("torch", None, f"no kernel takes this call: a kernel {reason}")
        elif route.reason is MEASURED_KIND and entry and taken.dtype not in entry.dtypes:  # autocast has changed it
            route = Route("torch", None, _unmeasured(taken.dtype))
    if route.backend == "torch" and not _joins(op):
        _say_stock(function, route.reason, device_type(input))
    return route, prepared


def _measured(op: str, arguments: tuple[Any, ...]) -> tuple[tuning.Found | None, str]:
    """Return the table entry of a call, after a trial if there was none; without an entry, why there was no trial."""
    if op not in RECORDS or not RECORDS[op].tuned:
        return None, ""
    if not torch.compiler.is_compiling():
        if torch._C._get_tracing_state() is not None:  # sizes are no numbers there
            return None, "no table is read while torch.jit traces"
        kinds = zip(RECORDS[op].parameters, arguments)
        tensors = [each for parameter, each in kinds if parameter.kind in TENSORS]
        if not all(each is None or isinstance(each, Tensor) for each in tensors):  # the stock layers say so
            return None, ""
    found = tuning.winner(op, arguments, _problem)
    if found or _joins(op) or torch.compiler.is_compiling() or not trial.concerns(arguments[0]):
        return found, ""
    why = trial.run(op, arguments)
    if not why:
        return tuning.winner(op, arguments, _problem), ""
    if why in (trial.BUSY, trial.CAPTURING):  # the next such call may be tried, so no plan may keep this route
        tables_changed()
    return None, why


def _problem(op: str, name: str, algorithm: str | None) -> str:
    """Say why the backend or algorithm of a table entry is not available here, or return an empty string."""
    if name != "torch" and name not in (RECORDS[op].backends if _joins(op) else KERNEL_BACKENDS):
        return f"the op has no backend {name!r}"
    return unusable(name, algorithm)


def _by_kind_of_device(op: str, arguments: tuple[Any, ...], why: str) -> Route:
    """Return the route that `FASTEST` gives for the type of device."""
    input = arguments[0]
    entry = FASTEST.get((device_type(input), op))
    if entry is None and (device_type(input), op) in STOCK_IS_AS_FAST and input.dtype == torch.float32:
        return Route("torch", None, STOCK_ON_THIS_KIND)
    if entry is None or input.dtype not in entry.dtypes:
        return Route("torch", None, _unmeasured(input.dtype, why))
    least = entry.least(arguments)
    if input.numel() < least:
        return Route("torch", None, TOO_SMALL)
    if reason := MISSING[entry.backend]():
        # At the first use of what the build left out, as pip does not show that.
        _say_once(logging.WARNING, f"the stock layers run, as kernels are missing: {reason}; see `fastcnn doctor`")
        return Route("torch", None, reason)
    return Route(entry.backend, None, MEASURED_KIND)


def _unmeasured(dtype: torch.dtype, why: str = "") -> str:
    return f"{UNMEASURED} and {dtype} on this device" + (f" ({why})" if why else "")


_said: set[str] = set()


def _say_once(level: int, message: str) -> None:
    if not torch.compiler.is_compiling() and message not in _said:
        _said.add(message)
        logger.log(level, message)


def _say_stock(function: str, reason: str, device: str) -> None:
    """Log why the stock layers run, unless they are as fast."""
    if reason not in (STOCK_ON_THIS_KIND, TOO_SMALL) and not reason.startswith("measured"):
        _say_once(logging.INFO, f"{function} runs the stock layers: {reason} ({device})")


def _unfit(name: str, algorithm: str | None, input: Tensor) -> str:
    """Say why a backend cannot run on this input in this mode, or return an empty string."""
    if device_type(input) != RUNS_ON[name]:
        return f"needs argument 'input' on a {RUNS_ON[name]} device, got {input.device}"
    if torch.autograd.forward_ad._current_level >= 0:
        return "has no forward-mode derivative (torch.func.jvp, jacfwd); backend 'torch' has"
    if name != "cuda" or algorithm != "implicit_gemm" or input.dtype != torch.float32:
        return ""
    if torch.backends.cudnn.conv.fp32_precision == "tf32":  # type: ignore[attr-defined]
        return ""
    return "multiplies float32 in TF32 by 'implicit_gemm', which torch.backends.cudnn.allow_tf32 forbids"
