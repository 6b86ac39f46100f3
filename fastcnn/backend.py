"""Which backend and algorithm a call gets."""

import functools
import importlib
import logging
import os
from collections.abc import Callable
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastcnn import tuning
from fastcnn.algorithms import ALGORITHMS, CONFIGURED, GRADIENTS
from fastcnn.available import BACKENDS, MISSING, RUNS_ON

logger = logging.getLogger("fastcnn")

_KERNELS = BACKENDS[2:]
_HAVE = ALGORITHMS | GRADIENTS  # the backends
# Ops that not every backend has kernels of. The other backends run torch's operations, as they do for any layer that is
# no stage.
_ONLY = {"normalize": ("triton",), "linear_relu_dropout": ("triton",)}


class Fastest(NamedTuple):
    """Where a backend has been measured to beat the stock layers."""

    backend: str
    dtypes: tuple[torch.dtype, ...]
    least_elements: int = 0  # of the input: below, a call costs more in Python than its kernel saves
    channels_last: bool = True

    def beats_stock(self, input: Tensor) -> bool:
        """Whether the backend is the faster one for an input of this size and layout."""
        return input.numel() >= self.least_elements and (self.channels_last or input.is_contiguous())


# What `auto` takes for an op on a device type. An entry needs a parity pass and a time measured on such a device,
# stock torch among the candidates; without one, `auto` runs the stock layers.
# CPU: benchmarks/results/cpu/*.jsonl. conv_relu and linear_relu stay stock's: their time is the matrix product's, which
# is torch's either way. Stock's channels_last max-pool is as fast as ours, and so is its batch norm there, with a pool
# or without; so is its add_relu. By running statistics (bn_relu_running) stock is the faster one forward.
# In bfloat16 torch has no LRN on the CPU outside autocast.
# A batch norm folded into its convolution (conv_bn) saves too little there to be told from none.
FASTEST: dict[tuple[str, str], Fastest] = {
    ("cpu", "bn_relu"): Fastest("cpu", (torch.float32,), 2**18, channels_last=False),
    ("cpu", "bn_relu_pool"): Fastest("cpu", (torch.float32,), 2**18, channels_last=False),
    ("cpu", "conv_relu_pool"): Fastest("cpu", (torch.float32, torch.bfloat16), 3 * 2**14, channels_last=False),
    ("cpu", "lrn"): Fastest("cpu", (torch.float32, torch.bfloat16)),
    ("cpu", "lrn_pool"): Fastest("cpu", (torch.float32, torch.bfloat16)),
    ("cpu", "max_pool"): Fastest("cpu", (torch.float32, torch.bfloat16), 2**17, channels_last=False),
}


class _Choice:
    """The backend and algorithm asked for; one for the process, so that worker threads (DataParallel) see it too."""

    backend = "auto"
    algorithm: str | None = None
    problem = ""  # with the environment variables: importing never fails, the call explains


_choice = _Choice()  # an instance: Dynamo guards its attributes, so a compiled graph sees a change


_said: set[tuple[str, str | torch.dtype, str]] = set()


class use_backend:
    """Choose the backend of every fastcnn call that follows, or of a ``with`` block.

    ``auto`` takes the fastest backend known for each call and may fall back to the stock layers, saying so once per
    reason in the log ``fastcnn``. Any other backend is explicit: a call that it cannot serve raises. The environment
    variables ``FASTCNN_BACKEND`` and ``FASTCNN_ALGORITHM`` set the same for a whole process.

    Args:
        name: ``auto``, ``torch``, ``triton``, ``cuda`` or ``cpu``; :func:`backends` tells which are available.
        algorithm: how convolution stages run where a backend has several ways: ``epilogue`` (torch's convolution,
            then one pass of ours), ``implicit_gemm`` (the convolution is ours too), ``direct`` or ``packed`` (ours, for
            up to four input channels), ``space_to_depth`` (ours, for strided convolutions), ``tma`` or
            ``warp_specialized`` (ours, fed by the copy engine of Hopper GPUs: stride 1, 16-bit types). ``None`` leaves
            the choice to the backend, as one must under ``auto`` and ``torch``. An algorithm with several
            configurations takes one of them by name: ``implicit_gemm:128x64x32w8s3``. Gradients of the convolution
            that shall be ours rather than torch's follow after a plus: ``epilogue+dgrad+wgrad`` (input and weight).

    Raises:
        ValueError: an unknown name, or an algorithm that the backend does not have.
        RuntimeError: a backend that is not available here; the message says why.

    Example:
        >>> import torch, fastcnn
        >>> with fastcnn.use_backend("torch"):
        ...     fastcnn.functional.max_pool2d(torch.ones(1, 1, 4, 4), 2).shape
        torch.Size([1, 1, 2, 2])
    """

    def __init__(self, name: str, *, algorithm: str | None = None) -> None:
        _validate(name, algorithm)
        self._before = (_choice.backend, _choice.algorithm, _choice.problem)
        _choice.backend, _choice.algorithm, _choice.problem = name, algorithm, ""

    def __enter__(self) -> "use_backend":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _choice.backend, _choice.algorithm, _choice.problem = self._before


def _validate(name: str, algorithm: str | None) -> None:
    if name not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {name!r}")
    parts = [part.partition(":") for part in algorithm.split("+")] if algorithm is not None else []
    for number, (bare, _, _) in enumerate(parts):
        known, what = (GRADIENTS, "after a plus") if number else (ALGORITHMS, "")
        if bare not in known or bare in [part[0] for part in parts[:number]]:
            able = f"one of {', '.join(known)}" + (" once" if number else " or None")
            raise ValueError(f"algorithm: expected {able}{what and f' {what}'}, got {algorithm!r}")
        if name in _KERNELS and name not in known[bare]:
            able = ", ".join(repr(each) for each, backends in known.items() if name in backends) or "no gradients"
            raise ValueError(f"algorithm: backend {name!r} has {able}{what and f' {what}'}, got {algorithm!r}")
    if parts and name not in _KERNELS:
        able = ", ".join(repr(each) for each in _KERNELS if all(each in _HAVE[bare] for bare, _, _ in parts))
        wanted = f"one of {able}" if able else "and none has all of it"
        got = f"{name!r}, which {'chooses algorithms itself' if name == 'auto' else 'has none'}"
        needs = f"needs its backend named, {wanted} (use_backend, FASTCNN_BACKEND)"
        raise ValueError(f"algorithm: {algorithm!r} {needs}; got backend {got}")
    if reason := MISSING[name]():
        raise RuntimeError(f"backend {name!r} is not available: {reason}")
    for bare, colon, configuration in parts:
        if colon and configuration not in (held := configurations(name, bare)):
            able = f"one of {', '.join(held)}" if held else "none, as it has no configurations"
            raise ValueError(f"algorithm: expected of {bare!r} under backend {name!r} {able}, got {algorithm!r}")


def _read_environment() -> None:
    try:
        use_backend(os.environ.get("FASTCNN_BACKEND", "auto"), algorithm=os.environ.get("FASTCNN_ALGORITHM"))
    except (ValueError, RuntimeError) as error:
        _choice.problem = f"environment variables FASTCNN_BACKEND, FASTCNN_ALGORITHM: {error}"


_read_environment()


def configurations(name: str, algorithm: str) -> tuple[str, ...]:
    """Return the names of the configurations of a backend's algorithm, if it has several."""
    where = CONFIGURED.get((name, algorithm))
    return tuple(config.name for config in kernel(name, *where)) if where else ()  # type: ignore[attr-defined]


STOCK = tuning.Winner("torch", None)


def planned(op: str, function: str, arguments: tuple[Any, ...], measured: str = "") -> tuning.Winner | None:
    """Return what runs a call, as far as that is known before its arguments are checked.

    Args:
        op: the op's stem.
        function: the public function's name, for messages.
        arguments: the function's, by position; the first is the input.
        measured: the name in `FASTEST`, where it is not the op's.

    Returns:
        `STOCK` where the stock layers run whatever the arguments are, so that torch itself checks them; the winner of
        the tuning tables; or None, and `choose` decides.
    """
    name = _choice.backend
    if name != "auto":
        return STOCK if name == "torch" else None
    if _choice.problem or not isinstance(arguments[0], Tensor):
        return None
    winner = tuning.winner(op, arguments, _unusable)
    if winner is None:
        return STOCK if _is_slower(measured or op, function, arguments[0]) else None
    return STOCK if winner.backend == "torch" else winner


def tabled(op: str, arguments: tuple[Any, ...]) -> tuning.Winner | None:
    """Return what runs a call of an op that `auto` takes by a tuning table alone; as `planned`, but silent."""
    name = _choice.backend
    if name != "auto":
        return STOCK if name == "torch" else None
    if _choice.problem:
        return None
    winner = tuning.winner(op, arguments, _unusable)
    return STOCK if winner is None or winner.backend == "torch" else winner


def _unusable(name: str, algorithm: str | None) -> str:
    try:
        _validate(name, algorithm)
    except (ValueError, RuntimeError) as error:
        return str(error)
    return ""


def runs_stock(op: str, function: str, input: object) -> bool:
    """Whether a call runs the stock layers whatever its arguments are, of an op that is in no tuning table."""
    name = _choice.backend
    if name != "auto":
        return name == "torch"
    return isinstance(input, Tensor) and not _choice.problem and _is_slower(op, function, input)


def _is_slower(op: str, function: str, input: Tensor) -> bool:
    """Whether no backend has been measured to beat the stock layers on such an input, or its backend is missing."""
    device = device_type(input)
    entry = FASTEST.get((device, op))
    if entry is None or input.dtype not in entry.dtypes:
        _say_once(function, input.dtype, device)
        return True
    if input.layout is not torch.strided:
        _say_once(function, f"no kernel takes {input.layout}", device)
        return True
    if not entry.beats_stock(input):
        return True
    reason = MISSING[entry.backend]()
    if reason:
        _say_once(function, reason, device)
    return bool(reason)


def device_type(tensor: Tensor) -> str:
    """Return ``tensor.device.type``, which takes half a microsecond to read, sooner."""
    return "cpu" if tensor.is_cpu else "cuda" if tensor.is_cuda else tensor.device.type


def chosen() -> str:
    """Return the backend that was asked for."""
    return _choice.backend


def lacks(op: str) -> bool:
    """Whether a backend was chosen that has no kernels of an op at all."""
    return _choice.backend in _KERNELS and _choice.backend not in _ONLY[op]


def choose(
    op: str, function: str, input: Tensor, refusal: Callable[[], str], winner: tuning.Winner | None
) -> tuple[str, str | None]:
    """Return backend and algorithm of a call that `planned` left open; under `auto` that may be ``torch``.

    Args:
        op: the op's stem.
        function: the public function's name, for messages.
        input: the tensor whose device and dtype decide, after autocast.
        refusal: says why no kernel of any backend serves these arguments, or an empty string.
        winner: what `planned` has said of the call.

    Raises:
        RuntimeError: an explicit backend cannot serve the call.
    """
    name = _choice.backend
    if _choice.problem:
        raise RuntimeError(_choice.problem)
    if name == "auto":
        return _fastest(op, function, input, refusal, winner)
    algorithm = _choice.algorithm
    if reason := _wrong_device(name, input) or _forward_mode() or _wrong_precision(name, algorithm, input) or refusal():
        raise RuntimeError(f"{function}: backend {name!r} {reason}")
    return name, algorithm


def _fastest(
    op: str, function: str, input: Tensor, refusal: Callable[[], str], winner: tuning.Winner | None
) -> tuple[str, str | None]:
    reason = _forward_mode() or refusal()
    if winner:
        fastest = winner
        reason = _wrong_device(winner.backend, input) or _wrong_precision(*winner, input) or reason
    else:
        entry = FASTEST[device_type(input), op]
        fastest = tuning.Winner(entry.backend, None)
        if input.dtype not in entry.dtypes:  # autocast has changed it
            reason = _unmeasured(input.dtype)
    if not reason:
        return fastest
    _say_once(function, reason, device_type(input))
    return "torch", None


def _unmeasured(dtype: torch.dtype) -> str:
    return f"no kernel has been measured for {dtype} on this kind of device yet"


def _say_once(function: str, reason: str | torch.dtype, device: str) -> None:
    """Log why the stock layers run: a reason, or a dtype that nothing has been measured for."""
    if not torch.compiler.is_compiling() and (function, reason, device) not in _said:
        _said.add((function, reason, device))
        why = reason if isinstance(reason, str) else _unmeasured(reason)
        logger.info("%s runs the stock layers: %s (%s)", function, why, device)


def _wrong_device(name: str, input: Tensor) -> str:
    wanted = RUNS_ON[name]
    if device_type(input) == wanted:
        return ""
    return f"needs argument 'input' on a {wanted} device, got {input.device}"


def _wrong_precision(name: str, algorithm: str | None, input: Tensor) -> str:
    if name != "cuda" or algorithm != "implicit_gemm" or input.dtype != torch.float32:
        return ""
    if torch.backends.cudnn.conv.fp32_precision == "tf32":  # type: ignore[attr-defined]
        return ""
    return "multiplies float32 in TF32 by 'implicit_gemm', which torch.backends.cudnn.allow_tf32 forbids"


def _forward_mode() -> str:
    if torch.autograd.forward_ad._current_level >= 0:
        return "has no forward-mode derivative (torch.func.jvp, jacfwd); backend 'torch' has"
    return ""


@functools.cache
def kernel(backend: str, stem: str, name: str) -> Callable[..., Any]:
    """Return the launcher of an operator: ``fastcnn/<backend>/<stem>.py``, imported at its first use."""
    launcher: Callable[..., Any] = getattr(importlib.import_module(f"fastcnn.{backend}.{stem}"), name)
    return launcher
