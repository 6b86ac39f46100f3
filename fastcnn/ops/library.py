"""The operators ``torch.ops.fastcnn.<name>.<backend>``: one schema, one fake kernel, one overload a backend.

In a schema a window or a convolution's settings are one list of numbers, because every list costs a call half a
microsecond. Fake kernels and launchers take them apart: ``size, stride, padding, dilation, ceil_mode`` and
``stride, padding, dilation, groups``.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from fastcnn import backend, overrides

_library = torch.library.Library("fastcnn", "DEF")

KERNEL_BACKENDS = ("triton", "cuda", "cpu")
COMPILED_BACKENDS = ("cuda", "cpu")  # csrc/ops.cpp registers their kernels


def define(
    stem: str,
    name: str,
    signature: str,
    fake: Callable[..., Any],
    backends: tuple[str, ...] = KERNEL_BACKENDS,
    flops: Callable[..., int] | None = None,
) -> dict[str, Callable[..., Any]]:
    """Define an operator for every backend that has a kernel and return its overloads by backend.

    The overloads share schema and fake kernel, so that a traced graph names the backend it runs on.
    """
    overloads = {}
    for backend_name in backends:
        qualified = f"{name}.{backend_name}"
        _library.define(qualified + signature)
        if backend_name not in COMPILED_BACKENDS:
            _library.impl(qualified, _launcher(backend_name, stem, name), "CompositeExplicitAutograd")
        torch.library.register_fake(f"fastcnn::{qualified}", _taking_apart(fake), lib=_library)
        overloads[backend_name] = getattr(getattr(torch.ops.fastcnn, name), backend_name)
    if flops is not None:
        overrides.FLOPS[getattr(torch.ops.fastcnn, name)] = lambda *args, out_val=None: flops(*_apart(args))
    return overloads


def _taking_apart(fake: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        return fake(*_apart(args))

    return run


def _apart(args: tuple[Any, ...]) -> Iterator[Any]:
    for arg in args:
        if isinstance(arg, (list, tuple)):  # pairs, and a last number; or nothing, as of a pool that is not there
            yield from (arg[i : i + 2] for i in range(0, len(arg) - 1, 2))
            yield from arg[-1:]
        else:
            yield arg


def _launcher(backend_name: str, stem: str, name: str) -> Callable[..., Any]:
    def launch(*args: Any) -> Any:
        run = backend.kernel(backend_name, stem, name)
        device = args[0].device
        if device.type != "cuda" or device.index == torch.cuda.current_device():
            return run(*_apart(args))
        with torch.cuda.device(device):  # Triton launches on the current device, wherever the tensors are
            return run(*_apart(args))

    return launch
