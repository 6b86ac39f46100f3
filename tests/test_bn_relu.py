"""Batch norm + ReLU against stock torch: output, gradients, running statistics."""

from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from parity import (
    COMPILED,
    DEVICE,
    FORMATS,
    assert_parity,
    each_backend,
    each_case,
    each_compiled,
    each_dtype,
    each_format,
    each_variant,
    last_place,
    new,
    specials,
)
from tables import operators
from torch import Tensor

import fastcnn
import fastcnn.functional as FF


class Case(NamedTuple):
    """A shape, and which parameters there are."""

    shape: tuple[int, ...]
    training: bool = True
    weight: bool = True
    bias: bool = True
    eps: float = 1e-5
    scale: float = 1.0  # of the input, whose mean is `shift`
    shift: float = 0.0
    parameters: torch.dtype | None = None  # None: the input's

    def tensors(self, dtype: torch.dtype, format: torch.memory_format) -> tuple[Tensor | None, ...]:
        channels, parameters = self.shape[1], self.parameters or dtype
        x = (new(*self.shape, dtype=torch.float32) * self.scale + self.shift).to(dtype)
        x = x.to(memory_format=format) if x.dim() == 4 else x
        weight = new(channels, dtype=parameters) + 1 if self.weight else None
        return x, weight, new(channels, dtype=parameters) if self.bias else None


CASES = {
    "odd image": Case((3, 5, 7, 5)),
    "odd image, running statistics": Case((2, 5, 7, 5), training=False),
    "neither weight nor bias": Case((2, 3, 4, 5), weight=False, bias=False),
    "no bias, running statistics": Case((2, 3, 4, 5), training=False, bias=False),
    "channels over one block": Case((2, 70, 3, 2)),
    "rows of a matrix": Case((9, 6)),
    "sequence": Case((3, 4, 11)),
    "volume": Case((2, 3, 2, 3, 4)),
    "two values a channel": Case((2, 4, 1, 1)),
    "wide image": Case((1, 2, 3, 700)),
    "large eps": Case((2, 3, 4, 4), eps=0.5),
    "several programs": Case((3, 2, 40, 36)),
    "float32 parameters": Case((2, 8, 5, 4), parameters=torch.float32),
    "float32 parameters, running statistics": Case((2, 8, 5, 4), training=False, parameters=torch.float32),
}


def settings(case: Case) -> dict[str, Any]:
    return {"training": case.training, "eps": case.eps}


def statistics(case: Case, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return running statistics, the same at each call: where `like` is double they are exact in every dtype."""
    channels = case.shape[1]
    mean = torch.arange(channels, device=DEVICE) % 5 / 4 - 0.5 + case.shift
    dtype = like.dtype if like.dtype == torch.float64 or case.parameters is None else case.parameters
    return mean.to(dtype), (torch.arange(channels, device=DEVICE) % 3 + 1.0).to(dtype)


def stock(case: Case, input: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    return F.relu(F.batch_norm(input, *statistics(case, input), weight, bias, **settings(case)))


def fused(case: Case, input: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    return FF.batch_norm_relu(input, *statistics(case, input), weight, bias, **settings(case))


@each_backend
@each_variant(CASES)
def test_parity(case: Case, dtype: torch.dtype, format: torch.memory_format, backend: Any) -> None:
    assert_parity(partial(fused, case), partial(stock, case), case.tensors(dtype, format), backend)


FAR = {
    "mean far from zero": Case((2, 24, 9, 8), shift=1000.0),
    "small values": Case((2, 24, 9, 8), scale=1e-3),
    "large values": Case((2, 24, 9, 8), scale=1e3, shift=-5e3),
}


@each_backend
@each_case(FAR)
@each_format
def test_statistics_lose_no_precision(format: torch.memory_format, case: Case, backend: Any) -> None:
    assert_parity(partial(fused, case), partial(stock, case), case.tensors(torch.float32, format), backend)


@each_compiled
@pytest.mark.parametrize("channels", [3, 15, 16, 17, 40])
def test_channels_last_of_few_channels_and_of_many(channels: int, backend: Any) -> None:
    """Sixteen channels and fewer are summed in registers, more of them pixel by pixel; all in several blocks."""
    case = Case((2, channels, 53, 41))
    tensors = case.tensors(torch.float32, FORMATS["channels_last"])
    assert_parity(partial(fused, case), partial(stock, case), tensors, backend)


def running_after(function: Any, case: Case, input: Tensor, dtype: torch.dtype, momentum: float) -> list[Tensor]:
    mean, variance = (each.to(dtype) for each in statistics(case, input))
    function(input, mean, variance, training=True, momentum=momentum)
    return [mean, variance]


def stock_function(*arguments: Any, **settings: Any) -> Tensor:
    return F.relu(F.batch_norm(*arguments, **settings))


@each_backend
@each_format
@pytest.mark.parametrize("momentum", [0.1, 1.0, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_running_statistics(dtype: torch.dtype, momentum: float, format: torch.memory_format, backend: Any) -> None:
    case = Case((3, 5, 7, 5), scale=2.0, shift=3.0)
    input = case.tensors(dtype, format)[0]
    theirs = running_after(stock_function, case, input, dtype, momentum)
    exact = running_after(stock_function, case, input.double(), torch.float64, momentum)
    with fastcnn.use_backend(backend[0]):
        ours = running_after(FF.batch_norm_relu, case, input, dtype, momentum)
    for mine, other, truth in zip(ours, theirs, exact, strict=True):
        allowed = 2 * (other.double() - truth).abs().max().item() + last_place(truth, dtype)
        assert mine.dtype == dtype
        assert (mine.double() - truth).abs().max().item() <= allowed


@each_backend
def test_no_running_statistics_outside_training_are_touched(backend: Any) -> None:
    mean, variance = torch.zeros(3, device=DEVICE), torch.ones(3, device=DEVICE)
    with fastcnn.use_backend(backend[0]):
        FF.batch_norm_relu(new(2, 3, 4, 4, dtype=torch.float32), mean, variance)
    assert mean.eq(0).all()
    assert variance.eq(1).all()


@each_backend
@each_case({"training": True, "running statistics": False})
@each_format
def test_special_values(format: torch.memory_format, case: bool, backend: Any) -> None:
    input = specials(2, 4, 5, 6).to(memory_format=format)
    input[:, :2] = torch.randn(2, 2, 5, 6, device=DEVICE)  # a channel without, and one that begins with infinity
    input[0, 1, 0, 0] = float("inf")
    results = []
    for name, function in (("torch", stock_function), (backend[0], FF.batch_norm_relu)):
        leaf, running = (
            input.clone(memory_format=torch.preserve_format).requires_grad_(),
            torch.ones(2, 4, device=DEVICE),
        )
        with fastcnn.use_backend(name):
            output = function(leaf, running[0], running[1], training=case)
            output.backward(torch.ones_like(output))
        results.append((output, leaf.grad, running))
    for mine, other in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(mine, other, equal_nan=True)


@each_backend
@each_format
def test_constant_channel(format: torch.memory_format, backend: Any) -> None:
    case = Case((2, 4, 5, 6), bias=False)
    x = torch.full(case.shape, 3.7, device=DEVICE).to(memory_format=format).requires_grad_()
    with fastcnn.use_backend(backend[0]):
        output = fused(case, x, None, None)
        output.sum().backward()
    assert output.eq(0).all()
    assert x.grad is not None
    assert x.grad.isfinite().all()


@each_backend
def test_gradient_is_bitwise_repeatable(backend: Any) -> None:
    case = Case((4, 6, 20, 19))
    tensors = [each.requires_grad_() for each in case.tensors(torch.float32, torch.channels_last) if each is not None]
    with fastcnn.use_backend(backend[0]):
        first, second = (torch.autograd.grad(fused(case, *tensors).square().sum(), tensors) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@each_backend
@each_case(
    {
        "transposed": lambda x: x.transpose(2, 3),
        "every second": lambda x: x[:, ::2, 1:],
        "expanded": lambda x: x[:1].expand(3, -1, -1, -1),
    }
)
def test_views(case: Any, backend: Any) -> None:
    base = new(2, 6, 5, 7, dtype=torch.float32)

    def of(function: Any) -> Any:
        return lambda x: function(case(x), None, None, training=True)

    assert_parity(of(FF.batch_norm_relu), of(stock_function), (base,), backend)


@each_backend
@each_case({"training": True, "running statistics": False})
def test_empty_batch(case: bool, backend: Any) -> None:
    x = new(0, 3, 4, 4, dtype=torch.float32).requires_grad_()
    mean, variance = torch.zeros(3, device=DEVICE), torch.ones(3, device=DEVICE)
    with fastcnn.use_backend(backend[0]):
        output = FF.batch_norm_relu(x, mean, variance, training=case)
        output.sum().backward()
    assert output.shape == x.shape
    assert variance.eq(1).all()


@each_compiled
@each_format
@pytest.mark.parametrize("channels", [16, 21, 7])
@each_case({"float32": torch.float32, "bfloat16": torch.bfloat16})
def test_vectors_and_several_blocks(
    case: torch.dtype, channels: int, format: torch.memory_format, backend: Any
) -> None:
    shape = Case((3, channels, 24, 32))
    assert_parity(partial(fused, shape), partial(stock, shape), shape.tensors(case, format), backend)


@each_backend
def test_second_derivative(backend: Any) -> None:
    case = Case((3, 2, 4, 3))
    results = []
    for name, function in (("torch", stock), (backend[0], fused)):
        torch.manual_seed(1)
        tensors = [each.requires_grad_() for each in case.tensors(torch.float32, FORMATS["nchw"]) if each is not None]
        with fastcnn.use_backend(name):
            loss = function(case, *tensors).pow(3).sum()
            gradients = torch.autograd.grad(loss, tensors, create_graph=True)
            results.append(torch.autograd.grad(sum(g.square().sum() for g in gradients), tensors))
    for mine, other in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4 * other.abs().max().item())


SMALLEST = {torch.float32: 2.0**-149, torch.float16: 2.0**-24, torch.bfloat16: 2.0**-133}


@pytest.mark.skipif(("cpu", None) not in COMPILED, reason="needs backend cpu")
@each_dtype
@each_format
def test_no_gradient_flows_where_the_output_was_rounded_to_zero(
    format: torch.memory_format, dtype: torch.dtype
) -> None:
    """Half the smallest number is zero, one and a half times it are not."""
    x = (torch.arange(-8, 8).view(1, 2, 2, 4) * SMALLEST[dtype]).to(dtype).to(memory_format=format).requires_grad_()
    weight, bias, mean = torch.full((2,), 0.5), torch.zeros(2, requires_grad=True), torch.zeros(2)
    with fastcnn.use_backend("cpu"):
        y = FF.batch_norm_relu(x, mean, torch.ones(2), weight, bias, eps=0.0)
    _, bias_grad = torch.autograd.grad(y.sum(), [x, bias])
    assert torch.equal(bias_grad, (y > 0).sum((0, 2, 3)).float())
    assert bias_grad.tolist() == [0, 6]


@pytest.mark.skipif(not fastcnn.backends()["cpu"].available, reason="needs the compiled extension")
@pytest.mark.parametrize("gradient", [False, True], ids=["", "gradient"])
@pytest.mark.parametrize("training", [False, True], ids=["running", "batch"])
@each_format
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_auto_runs_the_kernel_where_it_was_measured_faster(
    dtype: torch.dtype, format: torch.memory_format, training: bool, gradient: bool
) -> None:
    x, mean, variance = torch.randn(64, 4, 32, 32).to(dtype), torch.zeros(4), torch.ones(4)
    x = x.to(memory_format=format).requires_grad_(gradient)
    with fastcnn.use_backend("auto"):
        ran = operators(lambda: FF.batch_norm_relu(x, mean, variance, training=training))
    kernels = {"bn_relu", "bn_relu_statistics"} if training else {"bn_relu"}
    assert set(ran) == (set() if dtype == torch.float16 else {f"fastcnn.{name}.cpu" for name in kernels})


@pytest.mark.skipif(("cpu", None) not in COMPILED, reason="needs backend cpu")
def test_running_mean_of_values_around_zero_is_as_exact_as_stocks() -> None:
    """Next to their spread the mean of a convolution's output is small: it shows every rounding of the sum."""
    x = F.conv2d(torch.randn(4, 3, 33, 32), torch.randn(16, 3, 3, 3))
    means = {}
    for name, values, backend in (("ours", x, "cpu"), ("stock", x, "torch"), ("exact", x.double(), "torch")):
        mean, variance = torch.zeros(16).to(values), torch.ones(16).to(values)
        with fastcnn.use_backend(backend), torch.no_grad():
            FF.batch_norm_relu(values, mean, variance, training=True)
        means[name] = mean.double()
    ours, stock = ((means[name] - means["exact"]).abs().max().item() for name in ("ours", "stock"))
    assert ours <= 2 * stock + last_place(means["exact"], torch.float32)


def test_explicit_backend_names_what_it_refuses() -> None:
    x, mean, variance = (
        new(2, 3, 4, 4, dtype=torch.float32),
        torch.zeros(3, device=DEVICE),
        torch.ones(3, device=DEVICE),
    )
    with fastcnn.use_backend("triton"):
        with pytest.raises(RuntimeError, match=r"batch_norm_relu: backend 'triton' takes argument 'weight' in float32"):
            FF.batch_norm_relu(x, mean, variance, torch.ones(3, device=DEVICE, dtype=torch.bfloat16))
        with pytest.raises(RuntimeError, match="'input' in float32, float16 or bfloat16"):
            FF.batch_norm_relu(x.double(), mean.double(), variance.double())
        with pytest.raises(ValueError, match="'running_var': expected both running statistics or neither"):
            FF.batch_norm_relu(x, mean, None)
        with pytest.raises(RuntimeError, match=r"torch\.func"):
            torch.func.grad(lambda t: FF.batch_norm_relu(t, mean, variance).sum())(x)


MISTAKES = {
    "one axis": ({"input": torch.ones(3)}, RuntimeError, "input"),
    "mean of another length": ({"running_mean": torch.zeros(4)}, RuntimeError, "running_mean"),
    "weight of another length": ({"weight": torch.zeros(5)}, RuntimeError, "weight"),
    "no running statistics": ({"running_mean": None, "running_var": None}, RuntimeError, "running_mean"),
    "negative eps": ({"eps": -1.0}, ValueError, "eps"),
    "zero eps in training": ({"eps": 0.0, "training": True}, ValueError, "eps"),
    "one value a channel": ({"input": torch.ones(1, 3, 1, 1), "training": True}, ValueError, "value"),
    "no momentum": ({"momentum": None}, TypeError, "momentum"),
    "weight a number": ({"weight": 1.0}, TypeError, "weight"),
}


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake(mistake: str, backend: str) -> None:
    wrong, kind, named = MISTAKES[mistake]
    arguments: dict[str, Any] = {
        "input": torch.ones(2, 3, 4, 4), "running_mean": torch.zeros(3), "running_var": torch.ones(3), **wrong
    }  # fmt: skip
    arguments = {name: each.to(DEVICE) if isinstance(each, Tensor) else each for name, each in arguments.items()}
    with fastcnn.use_backend(backend), pytest.raises(kind, match=named):
        FF.batch_norm_relu(**arguments)
    with pytest.raises(kind):
        stock_function(**arguments)
