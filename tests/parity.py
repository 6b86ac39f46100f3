"""The parity contract: forward and every gradient against stock torch, under the twice-torch rule.

Against a float64 reference the error of an output or a gradient may be at most twice that of the stock operations in
the same dtype and layout, plus one unit in the last place of the largest value. Dtype and shape equal stock's, and so
do the output's strides.
"""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastcnn
from fastcnn.tuning.parity import errors, last_place, strides

__all__ = ["last_place"]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# An error's largest value over one random gradient is chance where few numbers are summed; over several it is less so.
DRAWS, DRAWS_OF_COMPILED = 4, 16
FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}

each_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
each_format = pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)


def _available(*backends: tuple[str, str | None]) -> list[tuple[str, str | None]]:
    """Return those that run on the device under test; `cuda` runs on the CPU where FASTCNN_HOST_CUDA plays it."""
    return [(name, how) for name, how in backends if fastcnn.backends()[name].available and name != OTHER]


OTHER = "cpu" if DEVICE == "cuda" else ""
COMPILED = _available(("cpu", None), ("cuda", None))


def _each_of(*backends: tuple[str, str | None]) -> pytest.MarkDecorator:
    ids = ["-".join(part for part in backend if part) for backend in backends]
    return pytest.mark.parametrize("backend", backends, ids=ids)


each_backend = _each_of(("triton", None), *COMPILED)
each_compiled = _each_of(*COMPILED)
each_convolution = _each_of(
    ("triton", "epilogue"),
    ("triton", "implicit_gemm"),
    *_available(("cpu", None), ("cuda", "epilogue"), ("cuda", "implicit_gemm")),
)


def each_case(cases: dict[str, Any]) -> pytest.MarkDecorator:
    """Parametrize a test over named cases."""
    return pytest.mark.parametrize("case", cases.values(), ids=cases)


def each_variant(cases: dict[str, Any], whole: int = 2) -> pytest.MarkDecorator:
    """Parametrize a test over named cases, dtypes and layouts.

    The first `whole` cases run in every dtype and layout; the others, in turn, in two of the six pairs. Most pairs are
    a sweep: the first two cases share out the six, the others keep one each.
    """
    pairs = [(dtype, format) for dtype in DTYPES for format in FORMATS]
    params = []
    for i, (name, case) in enumerate(cases.items()):
        for n in range(6) if i < whole else (i % 6, (i + 3) % 6):
            dtype, format = pairs[n]
            once = (n // 2 + n % 2 + i) % 2 == 0 if i < 2 else n == i % 6
            marks = () if once else pytest.mark.sweep
            params.append(
                pytest.param(case, DTYPES[dtype], FORMATS[format], id=f"{name}-{dtype}-{format}", marks=marks)
            )
    return pytest.mark.parametrize(("case", "dtype", "format"), params)


def mostly_sweep(values: Iterable[Any], kept: int = 2) -> list[Any]:
    """Return a test's parameters, of which all but the first ones are a sweep."""
    return [value if n < kept else pytest.param(value, marks=pytest.mark.sweep) for n, value in enumerate(values)]


def new(*shape: int, dtype: torch.dtype, format: torch.memory_format = torch.contiguous_format) -> Tensor:
    """Return normal random values on the device under test."""
    values = torch.randn(shape, device=DEVICE).to(dtype)
    return values.to(memory_format=format) if len(shape) == 4 else values


def run(function: Callable[..., Tensor], tensors: tuple[Tensor | None, ...], cotangents: list[Tensor]) -> list[Tensor]:
    """Return the output and, for every tensor given, its gradients, one for each cotangent, stacked."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    output = function(*leaves)
    inputs = [leaf for leaf in leaves if leaf is not None]
    draws = [torch.autograd.grad(output, inputs, c.to(output), retain_graph=True) for c in cotangents]
    return [output.detach(), *(torch.stack(gradients) for gradients in zip(*draws, strict=True))]


def cotangents_like(function: Callable[..., Tensor], tensors: tuple[Tensor | None, ...], draws: int) -> list[Tensor]:
    """Return random gradients of the output, rounded to its dtype."""
    with torch.no_grad():
        output = function(*tensors)
    return [torch.randn(output.shape, device=output.device).to(output.dtype) for _ in range(draws)]


def assert_within_twice(mine: Tensor, theirs: Tensor, truth: Tensor, what: str = "value") -> None:
    """Assert dtype, shape and the twice-torch rule for one tensor: ours, stock's, and stock's in float64."""
    assert mine.dtype == theirs.dtype, what
    assert mine.shape == theirs.shape, what
    if truth.numel() == 0:
        return
    error, allowed = errors(mine, theirs, truth)
    assert error <= allowed, f"{what}: error {error:.3g}, allowed {allowed:.3g}"


def assert_parity(
    fast: Callable[..., Tensor],
    stock: Callable[..., Tensor],
    tensors: tuple[Tensor | None, ...],
    backend: tuple[str, str | None],
) -> None:
    """Assert the contract for a function of `tensors`; None stands for an absent bias."""
    single = next(t for t in tensors if t is not None).dtype == torch.float32
    if single and DEVICE == "cpu" and backend == ("cuda", "implicit_gemm"):
        tensors = tuple(None if t is None else t.bfloat16().float() for t in tensors)  # exact in TF32, as stock is not
    draws = DRAWS if backend[0] == "triton" else DRAWS_OF_COMPILED
    cotangents = cotangents_like(stock, tensors, draws if single else 1)
    plain = run(stock, tensors, cotangents)
    exact = run(stock, tuple(None if t is None else t.double() for t in tensors), cotangents)
    with fastcnn.use_backend(backend[0], algorithm=backend[1]):
        ours = run(fast, tensors, cotangents)
    for i, (mine, theirs, truth) in enumerate(zip(ours, plain, exact, strict=True)):
        what = "output" if i == 0 else f"gradient {i}"
        if i == 0 and truth.numel():
            assert strides(mine) == strides(theirs), what
        assert_within_twice(mine, theirs, truth, what)


def assert_same(
    fast: Callable[..., Tensor],
    stock: Callable[..., Tensor],
    tensors: tuple[Tensor | None, ...],
    backend: tuple[str, str | None],
) -> None:
    """Assert that output and gradients equal stock's, NaN and infinities included, but for the last place."""
    cotangents = cotangents_like(stock, tensors, 1)
    theirs = run(stock, tensors, cotangents)
    with fastcnn.use_backend(backend[0], algorithm=backend[1]):
        ours = run(fast, tensors, cotangents)
    for mine, other in zip(ours, theirs, strict=True):
        rtol = 4 * torch.finfo(mine.dtype).eps
        torch.testing.assert_close(mine, other, rtol=rtol, atol=rtol, equal_nan=True)


def specials(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return few distinct values (many ties), with NaN, both infinities and negative zero among them."""
    values = torch.randint(-2, 3, shape, device=DEVICE).to(dtype)
    flat = values.view(-1)
    count = max(1, flat.numel() // 12)
    for value in (float("nan"), float("inf"), float("-inf"), -0.0):
        flat[torch.randperm(flat.numel(), device=DEVICE)[:count]] = value
    return values
