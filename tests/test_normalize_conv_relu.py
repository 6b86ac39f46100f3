"""Normalization joined with convolution and ReLU: the stage of a Sequential against its layers run by stock torch."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from parity import DEVICE, FORMATS, assert_parity, each_variant, last_place, new
from tables import operators
from torch import nn

import fastcnn

PACKED, DEEP = ("triton", "packed"), ("triton", "space_to_depth")
JOINED = {"fastcnn.normalize_conv_relu.triton", "fastcnn.normalize_conv_relu_pool.triton"}

# algorithm, input, weight, settings
CASES: dict[str, tuple[Any, tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "VGG": (PACKED, (2, 3, 6, 9), (20, 3, 3, 3), {"padding": 1}),
    "AlexNet": (DEEP, (1, 3, 27, 23), (17, 3, 11, 11), {"stride": 4, "padding": 2}),
    "AlexNet, packed": (PACKED, (1, 3, 19, 23), (6, 3, 11, 11), {"stride": 4, "padding": 2}),
    "MNIST": (PACKED, (3, 1, 9, 10), (12, 1, 3, 3), {"padding": 1}),
    "7x7/2": (DEEP, (1, 3, 9, 11), (16, 3, 7, 7), {"stride": 2, "padding": 3}),
    "same": (PACKED, (1, 3, 6, 5), (4, 3, 3, 5), {"padding": "same"}),
    "empty batch": (PACKED, (0, 3, 6, 6), (4, 3, 3, 3), {}),
}


def constants(channels: int, **kind: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return means and deviations by which black and white become numbers that every dtype holds exactly."""
    mean = torch.tensor([0.5, 0.25, 0.75][:channels], device=DEVICE, **kind)
    return mean, torch.tensor([0.25, 0.125, 0.5][:channels], device=DEVICE, **kind)


def stage(channels: int, settings: dict[str, Any], pool: dict[str, Any] | None = None) -> Any:
    """Return the joined layers as a function of (input, weight, bias); the output's dtype is the weight's."""

    def run(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        out_channels, _, *size = weight.shape
        layers: list[nn.Module] = [
            fastcnn.nn.Normalize(*(c.tolist() for c in constants(channels)), dtype=weight.dtype).to(x.device),
            nn.Conv2d(channels, out_channels, tuple(size), **settings, bias=bias is not None, device="meta"),
            nn.ReLU(inplace=True),
            *([] if pool is None else [nn.MaxPool2d(**pool)]),
        ]
        given = {"1.weight": weight} | ({} if bias is None else {"1.bias": bias})
        return torch.func.functional_call(fastcnn.nn.Sequential(*layers), given, (x,))

    return run


def stock(settings: dict[str, Any], pool: dict[str, Any] | None = None) -> Any:
    """Return what torch does: normalize in float32, cast, convolve."""

    def run(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        unit = x.to(wide) / 255 if x.dtype == torch.uint8 else x.to(wide)
        mean, std = constants(x.shape[-3], dtype=wide)
        normal = ((unit - mean[:, None, None]) / std[:, None, None]).to(weight.dtype)
        y = F.relu(F.conv2d(normal, weight, bias, **settings))
        return y if pool is None else F.max_pool2d(y, **pool)

    return run


def parameters(weight: tuple[int, ...], dtype: torch.dtype, format: Any) -> tuple[torch.Tensor, torch.Tensor]:
    fan_in = weight[1] * weight[2] * weight[3]
    return new(*weight, dtype=dtype, format=format) / fan_in**0.5, new(weight[0], dtype=dtype)


def pictures(*shape: int, format: Any) -> torch.Tensor:
    return torch.randint(256, shape, dtype=torch.uint8, device=DEVICE).to(memory_format=format)


def assert_joined(function: Any, backend: tuple[str, str], *tensors: Any) -> None:
    with fastcnn.use_backend(backend[0], algorithm=backend[1]), torch.no_grad():
        assert operators(lambda: function(*tensors)).keys() & JOINED


@each_variant(CASES)
def test_bytes(case: Any, dtype: torch.dtype, format: torch.memory_format) -> None:
    backend, input, weight, settings = case
    x = pictures(*input, format=format)
    fast, plain = stage(input[1], settings), stock(settings)
    given = parameters(weight, dtype, format)
    assert_joined(fast, backend, x, *given)
    if dtype != torch.float32:  # rounded to this dtype, values around zero would have either sign, and either gradient
        assert_values(fast, plain, (x, *given), backend)
        x = x // 128 * 255
    assert_parity(lambda w, b: fast(x, w, b), lambda w, b: plain(x, w, b), given, backend)


def assert_values(fast: Any, plain: Any, tensors: tuple[torch.Tensor, ...], backend: Any) -> None:
    """Assert the contract for the output alone."""
    x, weight, bias = tensors
    with torch.no_grad():
        theirs, exact = plain(*tensors), plain(x, weight.double(), bias.double())
        with fastcnn.use_backend(backend[0], algorithm=backend[1]):
            ours = fast(*tensors)
    if exact.numel():
        allowed = 2 * (theirs.double() - exact).abs().max() + last_place(exact, weight.dtype)
        assert (ours.double() - exact).abs().max() <= allowed


@each_variant({name: CASES[name] for name in ("VGG", "AlexNet")})
def test_floats_have_a_gradient(case: Any, dtype: torch.dtype, format: torch.memory_format) -> None:
    backend, input, weight, settings = case
    x = (torch.randint(5, input, device=DEVICE) / 4).to(dtype).to(memory_format=format)
    assert_parity(stage(input[1], settings), stock(settings), (x, *parameters(weight, dtype, format)), backend)


@pytest.mark.parametrize("backend", [PACKED, DEEP], ids="-".join)
def test_without_bias_and_without_batch(backend: Any) -> None:
    x = pictures(2, 3, 8, 7, format=FORMATS["nchw"])
    fast, plain = stage(3, {"stride": 2, "padding": 1}), stock({"stride": 2, "padding": 1})
    weight, bias = parameters((5, 3, 3, 3), torch.float32, FORMATS["nchw"])
    assert_parity(lambda w: fast(x, w, None), lambda w: plain(x, w, None), (weight,), backend)
    assert_parity(lambda w, b: fast(x[0], w, b), lambda w, b: plain(x[0], w, b), (weight, bias), backend)


@pytest.mark.parametrize("backend", [PACKED, DEEP], ids="-".join)
def test_padding_is_zero_after_the_normalization(backend: Any) -> None:
    x = torch.full((1, 3, 4, 4), 255, dtype=torch.uint8, device=DEVICE)
    weight = torch.ones(8, 3, 2, 2, device=DEVICE)
    with torch.no_grad(), fastcnn.use_backend(backend[0], algorithm=backend[1]):
        corner = stage(3, {"stride": 2, "padding": 1})(x, weight, None)[0, 0, 0, 0]
    mean, std = constants(3)
    torch.testing.assert_close(corner, ((1 - mean) / std).sum())


def test_autocast_reads_bytes_into_its_dtype() -> None:
    model = fastcnn.nn.Sequential(fastcnn.nn.Normalize(0.5, 0.25), nn.Conv2d(3, 4, 3), nn.ReLU()).to(DEVICE)
    x = pictures(1, 3, 6, 6, format=FORMATS["nchw"])
    with torch.autocast(DEVICE, torch.bfloat16), torch.no_grad():
        expected = nn.Sequential(*model)(x)
        assert_joined(model, PACKED, x)
        with fastcnn.use_backend(PACKED[0], algorithm=PACKED[1]):
            torch.testing.assert_close(model(x), expected, rtol=0, atol=2**-6)  # values up to 4


NOT_JOINED = {
    "an algorithm that reads no bytes": (("triton", "implicit_gemm"), {}, {}),
    "no algorithm": (("triton", None), {}, {}),
    "gradients of ours": (("triton", "packed:64x16x32w4s1+wgrad"), {}, {}),
    "an even kernel, same: padded by hand": (PACKED, {"padding": "same", "kernel_size": 2}, {}),
    "reflected padding": (PACKED, {"padding": 1, "padding_mode": "reflect"}, {}),
    "stock": (("torch", None), {}, {}),
    "auto": (("auto", None), {}, {}),
}


@pytest.mark.parametrize("case", NOT_JOINED.values(), ids=NOT_JOINED)
def test_runs_one_after_the_other_elsewhere(case: Any) -> None:
    backend, settings, _ = case
    conv = nn.Conv2d(3, 4, **{"kernel_size": 3, **settings})
    model = fastcnn.nn.Sequential(fastcnn.nn.Normalize(0.5, 0.25), conv, nn.ReLU()).to(DEVICE)
    x = pictures(2, 3, 7, 6, format=FORMATS["nchw"])
    expected = F.relu(conv((x / 255 - 0.5) / 0.25))
    with fastcnn.use_backend(backend[0], algorithm=backend[1]), torch.no_grad():
        assert not operators(lambda: model(x)).keys() & JOINED
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


def test_hooked_layer_runs_itself() -> None:
    model = fastcnn.nn.Sequential(fastcnn.nn.Normalize(0.5, 0.25), nn.Conv2d(3, 4, 3), nn.ReLU()).to(DEVICE)
    seen: list[torch.Size] = []
    model[0].register_forward_hook(lambda _layer, _input, output: seen.append(output.shape))
    with fastcnn.use_backend(*PACKED[:1], algorithm=PACKED[1]), torch.no_grad():
        names = operators(lambda: model(pictures(1, 3, 6, 6, format=FORMATS["nchw"])))
    assert seen == [torch.Size([1, 3, 6, 6])]
    assert not names.keys() & JOINED


@pytest.mark.parametrize("pool", [None, {"kernel_size": 2}], ids=["plain", "pooled"])
def test_second_derivatives_compile_and_vmap(pool: Any) -> None:
    fast, plain = stage(3, {"padding": 1}, pool), stock({"padding": 1}, pool)
    x = torch.rand(2, 3, 6, 6, device=DEVICE)
    weight, bias = parameters((4, 3, 3, 3), torch.float32, FORMATS["nchw"])

    def curvature(function: Any) -> torch.Tensor:
        leaf, w = x.clone().requires_grad_(), weight.clone().requires_grad_()
        (slope,) = torch.autograd.grad(function(leaf, w, bias).square().sum(), leaf, create_graph=True)
        return torch.autograd.grad(slope.square().sum(), w)[0]

    def gradient(function: Any) -> torch.Tensor:
        w = weight.clone().requires_grad_()
        return torch.autograd.grad(function(x, w, bias).square().sum(), w)[0]

    layers = [fastcnn.nn.Normalize(0.5, 0.25), nn.Conv2d(3, 4, 3), nn.ReLU(), *([nn.MaxPool2d(2)] if pool else [])]
    model = fastcnn.nn.Sequential(*layers).to(DEVICE)
    with fastcnn.use_backend(PACKED[0], algorithm=PACKED[1]):
        torch.testing.assert_close(curvature(fast), curvature(plain), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(gradient(fast), gradient(plain), rtol=1e-4, atol=1e-4)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), model(x))
        mapped = torch.func.vmap(model)(x[None])
    torch.testing.assert_close(mapped[0], model(x), rtol=1e-4, atol=1e-5)


def test_keeps_the_bytes_alone_for_the_backward() -> None:
    x = pictures(2, 3, 8, 8, format=FORMATS["nchw"])
    weight, bias = parameters((4, 3, 3, 3), torch.float32, FORMATS["nchw"])
    kept: list[torch.dtype] = []
    with (
        fastcnn.use_backend(PACKED[0], algorithm=PACKED[1]),
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append((t.dtype, t.shape)) or t, lambda t: t),
    ):
        stage(3, {})(x, weight.requires_grad_(), bias)
    assert (torch.uint8, x.shape) in kept
    assert (torch.float32, x.shape) not in kept


def test_opcheck() -> None:
    x = pictures(1, 3, 6, 6, format=FORMATS["nchw"])
    weight, bias = parameters((4, 3, 3, 3), torch.bfloat16, FORMATS["channels_last"])
    given = (x, *constants(3), weight, bias, [1, 1, 1, 1, 1, 1, 1], "packed")
    torch.library.opcheck(torch.ops.fastcnn.normalize_conv_relu.triton, given)
    window = [2, 2, 2, 2, 0, 0, 1, 1, 0]
    torch.library.opcheck(torch.ops.fastcnn.normalize_conv_relu_pool.triton, (*given, window))
    torch.library.opcheck(torch.ops.fastcnn.normalize_conv_relu_pool_codes.triton, (*given, window))
