"""An op's record: its parameters by name; the operators' schemas, kernels' arguments and tables' keys derive from it.

The operators are ``torch.ops.fastcnn.<name>.<backend>``: one schema, one fake kernel, one overload a backend. In a
schema a window or a convolution's settings are one list of numbers, because every list costs a call half a microsecond.
"""

import re
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastcnn import backend, overrides
from fastcnn.ops import autograd
from fastcnn.parameters import (
    ACTIVATION,
    BIAS,
    CONSTANT,
    FREE,
    PAIR,
    RECORDS,
    RUNNING,
    SETTING,
    TENSORS,
    WEIGHT,
    Parameter,
    Record,
)
from fastcnn.route import Route, choose
from fastcnn.shapes import Window

_library = torch.library.Library("fastcnn", "DEF")

KERNEL_BACKENDS = ("triton", "cuda", "cpu")
COMPILED_BACKENDS = ("cuda", "cpu")  # csrc/ops.cpp registers their kernels


class Group(NamedTuple):
    """Parameters of a function that go together, and their part of the operators' schema."""

    schema: str
    parameters: tuple[Parameter, ...]


def _group(schema: str, **kinds: str) -> Group:
    return Group(schema, tuple(Parameter(name, *kind.split("/")) for name, kind in kinds.items()))


INPUT = _group("Tensor input", input=ACTIVATION)
OTHER = _group("Tensor other", other=ACTIVATION)
IMAGES = _group("Tensor input, Tensor mean, Tensor std", input=ACTIVATION, mean=CONSTANT, std=CONSTANT, dtype=FREE)
LINEAR = _group("Tensor weight, Tensor? bias", weight=WEIGHT, bias=BIAS)
CONVOLUTION = _group(
    "Tensor weight, Tensor? bias, int[] convolution, str? algorithm",
    weight=WEIGHT,
    bias=BIAS,
    stride=PAIR,
    padding=PAIR,
    dilation=PAIR,
    groups=SETTING,
)
BATCH_NORM = _group(
    "Tensor mean, Tensor variance, Tensor? weight, Tensor? bias, float eps",
    running_mean=RUNNING,
    running_var=RUNNING,
    weight=WEIGHT,
    bias=BIAS,
    training=SETTING,
    momentum=FREE,
    eps=FREE,
)
LRN = _group("int size, float alpha, float beta, float k", size=SETTING, alpha=FREE, beta=SETTING, k=FREE)
POOL = _group(
    "int[] window",
    pool_size=PAIR,
    pool_stride=f"{PAIR}/pool_size",
    pool_padding=PAIR,
    pool_ceil_mode=SETTING,
)
WINDOW = _group(
    "int[] window",
    kernel_size=PAIR,
    stride=f"{PAIR}/kernel_size",
    padding=PAIR,
    dilation=PAIR,
    ceil_mode=SETTING,
    return_indices=SETTING,
)

Overloads = dict[str, Callable[..., Any]]


class Op:
    """An op.

    Args:
        stem: its name in every folder.
        function: the public function's, for messages.
        groups: its parameters, in order.
        stock: runs the stock layers on the function's arguments.
        prepare: checks these, and returns what kernels take, the input first, after autocast.
        refuse: says of what `prepare` returned why no kernel takes it, or returns an empty string.
        backends: that have kernels of it.
        product, tuned: of its record (fastcnn/parameters.py).

    Example:
        >>> pool = Op("example", "example2d", INPUT, POOL)
        >>> pool.schema
        'Tensor input, int[] window'
        >>> [list(each) for each in pool.split(("x", 2, None, 0, False))]
        [['x'], [2, None, 0, False]]
    """

    def __init__(
        self,
        stem: str,
        function: str,
        *groups: Group,
        stock: Callable[..., Any] | None = None,
        prepare: Callable[..., Any] = lambda *arguments: arguments,
        refuse: Callable[..., str] = lambda *_: "",
        backends: tuple[str, ...] = KERNEL_BACKENDS,
        product: str = "",
        tuned: bool = True,
    ) -> None:
        self.stem, self.function, self.backends = stem, function, backends
        self.run_stock, self.prepare, self.refuse = stock, prepare, refuse
        self.schema = ", ".join(group.schema for group in groups)
        self._lengths = [len(group.parameters) for group in groups]
        self._parameters = tuple(each for group in groups for each in group.parameters)
        if groups:
            RECORDS[stem] = Record(function, self._parameters, backends, product, tuned)

    def split(self, arguments: tuple[Any, ...]) -> list[tuple[Any, ...]]:
        """Return a function's arguments by group."""
        rest = iter(arguments)
        return [tuple(islice(rest, length)) for length in self._lengths]

    def tensors(self, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return those of a function's arguments that are declared as tensors."""
        return tuple(each for parameter, each in zip(self._parameters, arguments) if parameter.kind in TENSORS)

    def route(self, arguments: tuple[Any, ...], measured: str = "") -> tuple[Route, Any]:
        """Return what runs a call, and its arguments as a kernel takes them: see `fastcnn.route.choose`."""
        return choose(self.stem, self.function, arguments, self.prepare, self.refuse, measured)

    def stock(self, *arguments: Any) -> Any:
        """Run the stock layers, which check their arguments; if they raise, `prepare` may raise a clearer error."""
        try:
            return self.run_stock(*arguments)  # type: ignore[misc]  # only ops that have one call this
        except Exception as error:
            refused = error
        self.prepare(*arguments)
        raise refused

    def by(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """Return what runs the calls of the public function: the stock layers, or ``run(route, *prepared)``."""

        def call(*arguments: Any) -> Any:
            route, prepared = self.route(arguments)
            return self.stock(*arguments) if route.backend == "torch" else run(route, *prepared)

        return call

    def define(
        self,
        name: str,
        signature: str,
        fake: Callable[..., Any],
        *,
        stem: str = "",
        flops: Callable[..., int] | None = None,
    ) -> Overloads:
        """Define an operator for every backend that has a kernel and return its overloads by backend.

        The overloads share schema and fake kernel, so that a traced graph names the backend it runs on.

        Args:
            name: the operator's.
            signature: its parameters and result, as schemas have them.
            fake: returns empty tensors like the result.
            stem: of the file that holds its kernel, where it is another one's.
            flops: returns the number of FLOPs of a call.
        """
        take = _taker(signature)
        overloads = {}
        for backend_name in self.backends:
            qualified = f"{name}.{backend_name}"
            _library.define(qualified + signature)
            if backend_name not in COMPILED_BACKENDS:
                launch = _launcher(backend_name, stem or self.stem, name, take)
                _library.impl(qualified, launch, "CompositeExplicitAutograd")
            torch.library.register_fake(f"fastcnn::{qualified}", lambda *args: fake(*take(args)), lib=_library)
            overloads[backend_name] = getattr(getattr(torch.ops.fastcnn, name), backend_name)
        if flops is not None:
            overrides.FLOPS[getattr(torch.ops.fastcnn, name)] = lambda *args, out_val=None: flops(*take(args))
        return overloads

    def forward(self, fake: Callable[..., Tensor], flops: Callable[..., int] | None = None) -> Overloads:
        """Define the operator of the op's own name: the output."""
        return self.define(self.stem, f"({self.schema}) -> Tensor", fake, flops=flops)

    def codes(self, fake: Callable[..., Tensor], flops: Callable[..., int] | None = None) -> Overloads:
        """Define the operator that returns the argmax codes too, given what makes an empty output."""

        def fake_codes(*args: Any) -> tuple[Tensor, Tensor]:
            output = fake(*args)
            return output, torch.empty_like(output, dtype=torch.uint8)

        signature = f"({self.schema}) -> (Tensor output, Tensor codes)"
        return self.define(f"{self.stem}_codes", signature, fake_codes, flops=flops)


def _taker(signature: str) -> Callable[[tuple[Any, ...]], Iterator[Any]]:
    """Return what turns an operator's arguments into a launcher's: windows rebuilt, a convolution's settings split."""
    names = re.findall(r"(\w+)[,)]", signature.partition(" -> ")[0])

    def take(args: tuple[Any, ...]) -> Iterator[Any]:
        for name, arg in zip(names, args, strict=True):
            if name in ("window", "pool"):
                yield Window.of_numbers(arg) if arg else None
            elif name == "convolution":
                yield from (arg[:2], arg[2:4], arg[4:6], *arg[6:])
            else:
                yield arg

    return take


def _launcher(backend_name: str, stem: str, name: str, take: Callable[..., Iterator[Any]]) -> Callable[..., Any]:
    def launch(*args: Any) -> Any:
        run = backend.kernel(backend_name, stem, name)
        device = args[0].device
        if device.type != "cuda" or device.index == torch.cuda.current_device():
            return run(*take(args))
        with torch.cuda.device(device):  # Triton launches on the current device, wherever the tensors are
            return run(*take(args))

    return launch


def operands(prepared: tuple[Any, ...]) -> Iterator[Any]:
    """Yield an operator's arguments: tensors and numbers as they are, windows and other settings flattened."""
    for each in prepared:
        if isinstance(each, tuple):
            yield from each.operands()  # type: ignore[attr-defined]
        else:
            yield each


def runner(function: Any, forward: Overloads) -> Callable[..., Any]:
    """Return a function that runs a prepared call, the backend last: by the Function if a backward may follow."""
    apply = autograd.applier(function)

    def run(*call: Any) -> Any:
        *prepared, backend_name = call
        if not autograd.needs_grad(*prepared):
            return forward[backend_name](*operands(tuple(prepared)))
        output = apply(*call)
        return output[0] if isinstance(output, tuple) else output

    return run
