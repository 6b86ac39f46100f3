"""An op's record: its parameters by name; the operators' schemas, kernels' arguments and tables' keys derive from it.

The operators are ``torch.ops.fastcnn.<name>.<backend>``: one schema, one fake kernel, one overload a backend. In a
schema a window or a convolution's settings are one list of numbers, because every list costs a call half a microsecond.
"""

import re
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastcnn import backend, overrides
from fastcnn.front import fronted
from fastcnn.ops import autograd, plans
from fastcnn.parameters import (
    ACTIVATION,
    BIAS,
    CONSTANT,
    FREE,
    PAIR,
    RECORDS,
    RUNNING,
    SETTING,
    WEIGHT,
    Parameter,
    Record,
)
from fastcnn.route import Route, choose
from fastcnn.shapes import Window, memory_format

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
    "int[] window", pool_size=PAIR, pool_stride=f"{PAIR}/pool_size", pool_padding=PAIR, pool_ceil_mode=SETTING
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
    """An op: stem, the public function's name for messages, and the groups of its parameters.

    Args:
        stock: runs the stock layers on the function's arguments.
        prepare: given the function's name too, checks these, and returns what kernels take, the input first, after
            autocast.
        refuse: says of what `prepare` returned why no kernel takes it, or returns an empty string.
        backends, product, tuned: of its record (fastcnn/parameters.py).
        measured: returns the name by which a call was measured, given its arguments, where that is not the stem.
        takes_empty: whether its kernels take an input without elements.
    """

    # What runs the calls of the public function: under torch.compile, which cannot trace the front, and otherwise.
    python: Callable[..., Any]
    planned: Callable[..., Any]
    values: Overloads  # the operator that runs without gradients,
    _recorded: Overloads  # and with them: where the op pools it returns codes too
    apply: Callable[..., Any]  # the Function's own: returns all that its forward returns
    gradients: Callable[..., Any]  # of a prepared call's tensors, given a Function's context and the output's gradient
    _settings: tuple[str, ...]

    def __init__(
        self,
        stem: str,
        function: str,
        *groups: Group,
        stock: Callable[..., Any] | None = None,
        prepare: Callable[..., Any] = lambda _, *arguments: arguments,
        refuse: Callable[..., str] = lambda *_: "",
        backends: tuple[str, ...] = KERNEL_BACKENDS,
        product: str = "",
        tuned: bool = True,
        measured: Callable[..., str] = lambda *_: "",
        takes_empty: bool = True,
    ) -> None:
        self.stem, self.function, self.groups, self.backends = stem, function, groups, backends
        self.run_stock: Any = stock
        self.checks, self.refuse = prepare, refuse
        self.prepare = partial(prepare, function)
        self._measured, self.takes_empty = measured, takes_empty
        self.schema = ", ".join(group.schema for group in groups)
        parameters = tuple(each for group in groups for each in group.parameters)
        if parameters:
            RECORDS[stem] = Record(function, parameters, backends, product, tuned)

    def route(self, arguments: tuple[Any, ...]) -> tuple[Route, Any]:
        """Return what runs a call, and its arguments as a kernel takes them: see `fastcnn.route.choose`."""
        return choose(self.stem, self.function, arguments, self.prepare, self.refuse, self._measured(*arguments))

    def runs_stock(self, route: Route, arguments: tuple[Any, ...]) -> bool:
        """Whether the stock layers run a call: by its route, or as there is nothing to launch a kernel for."""
        return route.backend == "torch" or not (self.takes_empty or arguments[0].numel())

    def stock(self, *arguments: Any) -> Any:
        """Run the stock layers, which check their arguments; if they raise, `prepare` may raise a clearer error."""
        try:
            return self.run_stock(*arguments)
        except Exception as error:
            refused = error
        self.prepare(*arguments)
        raise refused

    def runs(self, run: Callable[..., Any] | None = None) -> None:
        """Set what runs the calls of the public function: the stock layers, or ``run(route, *prepared)``."""

        def python(*arguments: Any) -> Any:
            route, prepared = self.route(arguments)
            if self.runs_stock(route, arguments):
                return self.stock(*arguments)
            return run(route, *prepared) if run is not None else self.run(*prepared, route.backend)

        self.runs_by(python)

    def runs_by(self, python: Callable[..., Any]) -> None:
        """Set what runs the calls of the public function down the Python path, and before it the front."""
        self.python = python
        self.planned = fronted(self.stem, partial(plans.plan, self), self.prepare, python)

    def differentiable(
        self,
        name: str,
        *settings: str,
        saves: Callable[..., tuple[Tensor | None, ...]],
        anchored: bool = False,
        forward: Callable[..., Any] | None = None,
        vmap: Callable[..., Any] | None = None,
    ) -> Callable[[Any], Any]:
        """Make the op's autograd Function, which runs prepared calls: tensors, settings, and the backend.

        It decorates what returns the gradients of the tensors, given the context and the output's gradient. `settings`
        are the attributes of the context that hold the settings; `saves` returns the tensors to save, given context,
        inputs and output; an `anchored` Function returns an anchor last (`autograd.anchor`).
        """
        recorded = self._recorded  # torch.compile cannot trace the record itself within the Function

        def usual(*call: Any) -> Any:
            output = recorded[call[-1]](*(operands(call[:-1]) if settings else call[:-1]))
            return (*output, autograd.anchor(output[0])) if anchored else output

        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            ctx.backend = inputs[-1]
            if settings:
                for name, value in zip(settings, inputs[-1 - len(settings) :]):
                    setattr(ctx, name, value)
            if type(output) is tuple:
                ctx.set_materialize_grads(False)
                ctx.mark_non_differentiable(output[1])
            ctx.save_for_backward(*saves(ctx, inputs, output))

        def decorate(gradients: Callable[..., Any]) -> Callable[..., Any]:
            def backward(ctx: Any, grad: Tensor | None, *others: Tensor | None) -> tuple[Tensor | None, ...]:
                if grad is None and anchored and others[-1] is not None:  # only the anchor has a gradient
                    grad = others[-1].new_zeros(ctx.saved_tensors[-2].shape)
                if grad is None:
                    return (None,) * len(ctx.needs_input_grad)
                return *gradients(ctx, grad), *(None,) * (len(settings) + 1)

            self.apply = autograd.function(name, forward or usual, setup_context, backward, vmap)
            self._settings, self.gradients = settings, gradients
            return gradients

        return decorate

    def run(self, *call: Any) -> Any:
        """Run a prepared call, the backend last: by the Function if a backward may follow."""
        if autograd.needs_grad(*call):
            output = self.apply(*call)
            return output[0] if isinstance(output, tuple) else output
        return self.values[call[-1]](*operands(call[:-1]))

    def derivative(self, backend: str, prepared: tuple[Any, ...], **context: Any) -> Callable[..., Any]:
        """Return what a node of the front calls for differentiable gradients; `context` has what else these read."""
        settings = (each for each in prepared if isinstance(each, tuple))
        context |= {"backend": backend, **dict(zip(self._settings, settings))}

        def derive(saved: tuple[Any, ...], needs: tuple[bool, ...], grad: Tensor) -> Any:
            return self.gradients(SimpleNamespace(saved_tensors=saved, needs_input_grad=needs, **context), grad)

        return derive

    def define(
        self,
        name: str,
        signature: str,
        fake: Callable[..., Any],
        flops: Callable[..., int] | None = None,
        stem: str = "",
    ) -> Overloads:
        """Define an operator for every backend that has a kernel, in the file of the `stem`; return its overloads.

        The overloads share schema and fake kernel, so that a traced graph names the backend it runs on.
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

    def forward(self, fake: Callable[..., Tensor], flops: Callable[..., int] | None = None, more: str = "") -> None:
        """Define the operator of the op's own name, with `more` parameters; if it pools, one with argmax codes too."""
        self.values = self._recorded = self.define(self.stem, f"({self.schema}{more}) -> Tensor", fake, flops)
        if not {POOL, WINDOW}.intersection(self.groups):
            return

        def fake_codes(*args: Any) -> tuple[Tensor, Tensor]:
            output = fake(*args)
            return output, torch.empty_like(output, dtype=torch.uint8)

        signature = f"({self.schema}) -> (Tensor output, Tensor codes)"
        self._recorded = self.define(f"{self.stem}_codes", signature, fake_codes, flops)


def _taker(signature: str) -> Callable[[tuple[Any, ...]], Iterator[Any]]:
    """Return what turns an operator's arguments into a launcher's: windows rebuilt, with a convolution's groups."""
    names = re.findall(r"(\w+)[,)]", signature.partition(" -> ")[0])

    def take(args: tuple[Any, ...]) -> Iterator[Any]:
        for name, arg in zip(names, args, strict=True):
            if name in ("window", "pool"):
                yield Window.of(arg) if arg else None
            elif name == "convolution":
                weight = args[names.index("weight")]
                yield Window.of((*weight.shape[2:], *arg[:6], 0))
                yield arg[6]
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


def like(input: Tensor, *_: Any) -> Tensor:
    """Return an empty tensor like an input, in the memory format that torch's pooling gives its output."""
    return torch.empty_like(input, memory_format=memory_format(input))


def operands(prepared: tuple[Any, ...]) -> list[Any]:
    """Return an operator's arguments: tensors and numbers as they are, windows and other settings flattened."""
    found: list[Any] = []
    for each in prepared:
        if isinstance(each, tuple):
            found.extend(each.operands())  # type: ignore[attr-defined]
        else:
            found.append(each)
    return found
