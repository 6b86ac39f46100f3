"""The backend that was asked for, for a block, a thread or the process; and which algorithms each backend has."""

import functools
import importlib
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._contextlib import _DecoratorContextManager

from fastcnn.available import BACKENDS, KERNEL_BACKENDS, MISSING

# Ways to run a stage that begins with a convolution, and the backends that have them.
ALGORITHMS = {
    "epilogue": ("triton", "cuda", "cpu"),
    "implicit_gemm": ("triton", "cuda"),
    "direct": ("cuda",),
    "tma": ("triton",),
    "warp_specialized": ("triton",),
    "packed": ("triton",),
    "space_to_depth": ("triton",),
}
# Those that can normalize images in the same kernel.
JOINED = {"packed": ("triton",), "space_to_depth": ("triton",)}
# The convolution's own gradients that our kernels compute if they are named after the algorithm and a plus.
GRADIENTS = {"dgrad": ("triton",), "wgrad": ("triton",)}
# Algorithms and gradients with configurations, named after a colon: the file in `fastcnn/<backend>/` and its list.
CONFIGURED = {
    ("triton", "implicit_gemm"): ("convolution.implicit_gemm", "CONFIGS"),
    ("triton", "packed"): ("convolution.first_layers", "CONFIGS"),
    ("triton", "space_to_depth"): ("convolution.implicit_gemm", "CONFIGS"),
    ("triton", "dgrad"): ("convolution.dgrad", "CONFIGS"),
    ("triton", "wgrad"): ("convolution.wgrad", "CONFIGS"),
    ("triton", "tma"): ("convolution.hopper", "TMA"),
    ("triton", "warp_specialized"): ("convolution.hopper", "WARP_SPECIALIZED"),
}


class Choice(NamedTuple):
    """What was asked for."""

    backend: str = "auto"
    algorithm: str | None = None
    problem: str = ""  # with the environment variables: the import succeeds, the first call raises this


class _Process:
    """The main thread's choice, which holds for all threads that have not made one themselves."""

    choice = Choice()


# An instance and a thread-local: Dynamo guards their attributes, so a compiled graph sees a change.
process = _Process()
_thread = threading.local()

# Functions without arguments: called in the thread whose choice has changed, and where a table of fastest backends has.
choice_watchers: list[Callable[[], None]] = []
table_watchers: list[Callable[[], None]] = []


def choice() -> Choice:
    """Return the choice that calls of this thread follow."""
    return own_choice() or process.choice


def chosen() -> str:
    """Return the name of the backend that calls of this thread ask for."""
    return choice().backend


def own_choice() -> Choice | None:
    """Return what this thread itself has chosen; None where it follows the process's choice."""
    mine: Choice | None = getattr(_thread, "choice", None)
    return mine


def tables_changed() -> None:
    """Call the `table_watchers`: the plans that they keep may be out of date."""
    _tell(table_watchers)


def _tell(watchers: list[Callable[[], None]]) -> None:
    if torch.compiler.is_compiling():  # a compiled graph keeps no plans
        return
    for watch in watchers:
        watch()


def _in_main_thread() -> bool:
    """Whether a choice made here holds for the process; while Dynamo traces it holds for the thread alone."""
    return not torch.compiler.is_compiling() and threading.current_thread() is threading.main_thread()


def _ident() -> int:
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


def _held() -> Choice | None:
    return process.choice if _in_main_thread() else own_choice()


def _set(wanted: Choice | None) -> None:
    """Set this thread's choice, in the main thread the process's; None: follow the process's choice again."""
    if _in_main_thread():
        process.choice, _thread.choice = wanted or Choice(), None
    else:
        _thread.choice = wanted
    _tell(choice_watchers)


@contextmanager
def only_here(name: str, algorithm: str | None = None) -> Iterator[None]:
    """Choose a backend for this thread alone, even in the main thread, while candidates are tried."""
    _validate(name, algorithm)
    before, _thread.choice = own_choice(), Choice(name, algorithm)
    _tell(choice_watchers)
    try:
        yield
    finally:
        _thread.choice = before
        _tell(choice_watchers)


class use_backend(_DecoratorContextManager):
    """Choose the backend of every fastcnn call that follows, of a ``with`` block, or of a function as its decorator.

    ``auto`` takes the fastest backend known for each call and may fall back to the stock layers; it logs each reason
    once, in the log ``fastcnn``. Any other backend is explicit: a call that it cannot serve raises an error. The
    environment variables ``FASTCNN_BACKEND`` and ``FASTCNN_ALGORITHM`` set the same for a whole process.

    A choice made in the main thread holds for the whole process, worker threads (DataParallel) included; a choice made
    in another thread holds for that thread. An object may be entered several times, also while it is entered.

    Args:
        name: ``auto``, ``torch``, ``triton``, ``cuda`` or ``cpu``; :func:`backends` tells which are available.
        algorithm: how convolution stages run where a backend has several ways: ``epilogue`` (torch's convolution,
            then one pass of ours), ``implicit_gemm`` (the convolution is ours too), ``direct`` or ``packed`` (ours, for
            up to four input channels), ``space_to_depth`` (ours, for strided convolutions), ``tma`` or
            ``warp_specialized`` (ours, fed by the copy engine of Hopper GPUs: stride 1, 16-bit types). ``None``, the
            only value under ``auto`` and ``torch``, leaves the choice to the backend. Some algorithms have
            configurations; name one after a colon: ``implicit_gemm:128x64x32w8s3``. A plus adds the convolution's
            gradients that our kernels compute instead of torch: ``epilogue+dgrad+wgrad`` (input and weight).

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
        super().__init__()
        _validate(name, algorithm)
        self._choice = Choice(name, algorithm)
        self._made: tuple[int, Choice | None] | None = _ident(), _held()  # where, and what held before
        _set(self._choice)

    def clone(self) -> "use_backend":
        """Return what a decorated function enters at each call: this object may be entered several times."""
        return self

    def __call__(self, orig_func: Any) -> Any:
        """Decorate a function: this choice then holds for its calls only."""
        self._undo()
        return super().__call__(orig_func)

    def __enter__(self) -> "use_backend":  # type: ignore[override]
        self._undo()
        if not hasattr(_thread, "before"):
            _thread.before = []
        _thread.before.append(_held())
        _set(self._choice)
        return self

    def __exit__(self, *_: object) -> None:
        _set(_thread.before.pop())

    def _undo(self) -> None:
        """Undo the choice that ``__init__`` set, unless another was made since; ``with`` sets it again."""
        made, self._made = self._made, None
        if made and made[0] == _ident() and _held() is self._choice:
            _set(made[1])


def _validate(name: str, algorithm: str | None) -> None:
    if name not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {name!r}")
    parts = [part.partition(":") for part in algorithm.split("+")] if algorithm is not None else []
    for number, (bare, _, _) in enumerate(parts):
        known, what = (GRADIENTS, "after a plus") if number else (ALGORITHMS, "")
        if bare not in known or bare in [part[0] for part in parts[:number]]:
            able = f"one of {', '.join(known)}" + (" once" if number else " or None")
            raise ValueError(f"algorithm: expected {able}{what and f' {what}'}, got {algorithm!r}")
        if name in KERNEL_BACKENDS and name not in known[bare]:
            able = ", ".join(repr(each) for each, backends in known.items() if name in backends) or "no gradients"
            raise ValueError(f"algorithm: backend {name!r} has {able}{what and f' {what}'}, got {algorithm!r}")
    if parts and name not in KERNEL_BACKENDS:
        have = ALGORITHMS | GRADIENTS
        able = ", ".join(repr(each) for each in KERNEL_BACKENDS if all(each in have[bare] for bare, _, _ in parts))
        wanted = f"one of {able}" if able else "and none has all of it"
        got = f"{name!r}, which {'chooses algorithms itself' if name == 'auto' else 'has none'}"
        needs = f"needs its backend named, {wanted} (use_backend, FASTCNN_BACKEND)"
        raise ValueError(f"algorithm: {algorithm!r} {needs}; got backend {got}")
    if reason := MISSING[name]():
        raise RuntimeError(f"backend {name!r} is not available: {reason}")
    for bare, colon, configuration in parts:
        if colon and configuration not in (held := configurations(name, bare)):
            able = f"one of {', '.join(held)}" if held else "none, as it has no configurations"
            where = f"for the configuration of {bare!r} under backend {name!r}"
            raise ValueError(f"algorithm: expected {where} {able}, got {algorithm!r}")


def _read_environment() -> None:
    name, algorithm = os.environ.get("FASTCNN_BACKEND", "auto"), os.environ.get("FASTCNN_ALGORITHM")
    problem = unusable(name, algorithm)
    if problem:
        problem = f"environment variables FASTCNN_BACKEND, FASTCNN_ALGORITHM: {problem}"
    process.choice = Choice(problem=problem) if problem else Choice(name, algorithm)


def unusable(name: str, algorithm: str | None) -> str:
    """Say why a backend with an algorithm cannot be had here, or return an empty string."""
    try:
        _validate(name, algorithm)
    except (ValueError, RuntimeError) as error:
        return str(error)
    return ""


def configurations(name: str, algorithm: str) -> tuple[str, ...]:
    """Return the names of the configurations of a backend's algorithm, if it has several."""
    where = CONFIGURED.get((name, algorithm))
    return tuple(config.name for config in kernel(name, *where)) if where else ()  # type: ignore[attr-defined]


def device_type(tensor: Tensor) -> str:
    """Return ``tensor.device.type`` faster: reading that attribute takes half a microsecond."""
    return "cpu" if tensor.is_cpu else "cuda" if tensor.is_cuda else tensor.device.type


@functools.cache
def kernel(backend: str, stem: str, name: str) -> Callable[..., Any]:
    """Return the launcher of an operator: ``fastcnn/<backend>/<stem>.py``, imported at its first use."""
    launcher: Callable[..., Any] = getattr(importlib.import_module(f"fastcnn.{backend}.{stem}"), name)
    return launcher


_read_environment()
