"""Normalization of images: alone, against stock torch and torchvision, and as the first layer of a Sequential."""

import copy
from collections import OrderedDict
from typing import Any

import pytest
import torch
from parity import DEVICE, DTYPES, FORMATS, assert_parity, assert_same, each_dtype, each_format, last_place, specials
from torch import nn

import fastcnn
import fastcnn.functional as FF
from fastcnn.triton import tiles

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TRITON = ("triton", None)
SHAPES = {
    "colours": (2, 3, 7, 5),
    "grey": (3, 1, 6, 4),
    "more than a block": (2, 3, 33, 31),
    "five channels": (1, 5, 3, 2),
    "no image": (0, 3, 4, 4),
}


def constants(channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and std for so many channels."""
    return torch.linspace(0.4, 0.5, channels, device=DEVICE), torch.linspace(0.2, 0.3, channels, device=DEVICE)


def images(*shape: int, format: torch.memory_format = torch.contiguous_format) -> torch.Tensor:
    return torch.randint(256, shape, dtype=torch.uint8, device=DEVICE).to(memory_format=format)


def stock(x: torch.Tensor, mean: torch.Tensor, std: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Normalize as torchvision does, in the output's own dtype."""
    unit = x.to(dtype) / 255 if x.dtype == torch.uint8 else x.to(dtype)
    return (unit - mean.to(dtype)[:, None, None]) / std.to(dtype)[:, None, None]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@each_dtype
@each_format
def test_bytes(format: torch.memory_format, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, (mean, std) = images(*shape, format=format), constants(shape[1])
    with fastcnn.use_backend("triton"):
        ours = FF.normalize(x, mean, std, dtype)
    theirs, exact = stock(x, mean, std, dtype), stock(x, mean.double(), std.double(), torch.float64)
    assert ours.dtype == dtype
    assert ours.stride() == theirs.stride()
    if exact.numel():
        allowed = 2 * (theirs.double() - exact).abs().max().item() + last_place(exact, dtype)
        assert (ours.double() - exact).abs().max().item() <= allowed


@each_dtype
@each_format
def test_floats_and_their_gradient(format: torch.memory_format, dtype: torch.dtype) -> None:
    mean, std = constants(3)
    x = torch.rand(2, 3, 7, 5, device=DEVICE).to(dtype).to(memory_format=format)
    assert_parity(
        lambda x: FF.normalize(x, mean, std), lambda x: stock(x, mean.to(x), std.to(x), x.dtype), (x,), TRITON
    )


@pytest.mark.parametrize("backend", ["auto", "torch", "triton"])
def test_equals_torchvision(backend: str) -> None:
    transforms = pytest.importorskip("torchvision.transforms.v2")
    x = images(2, 3, 9, 8)
    expected = transforms.Normalize(MEAN, STD)(transforms.ToDtype(torch.float32, scale=True)(x.cpu())).to(DEVICE)
    with fastcnn.use_backend(backend):
        torch.testing.assert_close(FF.normalize(x, MEAN, STD), expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(FF.normalize(x[0], MEAN, STD), expected[0], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(FF.normalize(x.float() / 255, MEAN, STD), expected, rtol=1e-6, atol=1e-6)


def test_one_constant_for_all_channels_and_views() -> None:
    x = images(2, 4, 6, 5)[:, 1:, ::2].transpose(2, 3)
    with fastcnn.use_backend("triton"):
        ours = FF.normalize(x, 0.5, [0.25], torch.float32)
    torch.testing.assert_close(ours, (x / 255 - 0.5) / 0.25)


def test_special_values_go_through() -> None:
    mean, std = constants(2)
    x = specials(2, 2, 5, 4)
    assert_same(lambda x: FF.normalize(x, mean, std), lambda x: stock(x, mean, std, x.dtype), (x,), TRITON)


def test_dtype_of_the_output() -> None:
    x = images(1, 3, 4, 4)
    for backend in ("torch", "triton"):
        with fastcnn.use_backend(backend):
            assert FF.normalize(x, MEAN, STD).dtype == torch.float32
            assert FF.normalize(x.half(), MEAN, STD).dtype == torch.float16
            assert FF.normalize(x, MEAN, STD, torch.float16).dtype == torch.float16
            with torch.autocast(DEVICE, torch.bfloat16):
                assert FF.normalize(x, MEAN, STD).dtype == torch.bfloat16
                assert FF.normalize(x, MEAN, STD, torch.float32).dtype == torch.float32


@pytest.mark.parametrize("backend", ["cpu", "cuda"])
def test_backends_without_a_kernel_run_torchs_operations(backend: str) -> None:
    if not fastcnn.backends()[backend].available:
        pytest.skip(f"needs backend {backend}")
    x = images(1, 3, 4, 4)
    with fastcnn.use_backend("torch"):
        expected = FF.normalize(x, MEAN, STD)
    with fastcnn.use_backend(backend):
        assert FF.normalize(x, MEAN, STD).equal(expected)


MISTAKES: dict[str, tuple[tuple[Any, ...], type[Exception], str]] = {
    "no tensor": (([1.0], MEAN, STD), TypeError, "'input': expected a Tensor"),
    "integers": ((torch.zeros(1, 3, 2, 2, dtype=torch.int64), MEAN, STD), TypeError, "uint8 or a floating dtype, got"),
    "no image": ((torch.zeros(3, 2), MEAN, STD), RuntimeError, "'input': expected \\(N, C, H, W\\)"),
    "two means": ((torch.zeros(1, 3, 2, 2), (0.5, 0.5), STD), RuntimeError, "'mean': expected 1 value or 3"),
    "two stds": ((torch.zeros(1, 3, 2, 2), MEAN, torch.ones(2)), RuntimeError, "'std': expected 1 value or 3"),
    "a std of 0": ((torch.zeros(1, 3, 2, 2), MEAN, (1.0, 0.0, 1.0)), ValueError, "'std': expected no 0"),
    "a word": ((torch.zeros(1, 3, 2, 2), "grey", STD), TypeError, "'mean': expected a number"),
    "dtype of integers": ((torch.zeros(1, 3, 2, 2), MEAN, STD, torch.int32), TypeError, "'dtype': expected a floating"),
}


@pytest.mark.parametrize("case", MISTAKES.values(), ids=MISTAKES)
def test_mistakes(case: Any) -> None:
    arguments, kind, message = case
    with pytest.raises(kind, match=message):
        FF.normalize(*arguments)


def test_an_explicit_backend_refuses_float64() -> None:
    with fastcnn.use_backend("triton"), pytest.raises(RuntimeError, match="backend 'triton' takes argument 'input'"):
        FF.normalize(torch.zeros(1, 3, 2, 2, dtype=torch.float64, device=DEVICE), MEAN, STD)


def test_reference_gradient() -> None:
    x = torch.rand(1, 2, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: FF.normalize(x, (0.4, 0.5), 0.25), (x,))


@each_format
def test_offsets_of_64_bits(format: torch.memory_format, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "WIDE_FROM", 1)
    x = images(2, 3, 5, 4, format=format)
    with fastcnn.use_backend("triton"):
        ours = FF.normalize(x, MEAN, STD)
    torch.testing.assert_close(ours, FF.normalize(x, MEAN, STD))


def test_derivatives_of_derivatives_and_vmap() -> None:
    x = torch.rand(2, 2, 3, 4, 4, device=DEVICE)
    with fastcnn.use_backend("triton"):
        each = torch.func.vmap(lambda x: FF.normalize(x, MEAN, STD))(x)
        slope = torch.func.grad(lambda x: FF.normalize(x, MEAN, STD).square().sum())
        curve = torch.func.grad(lambda x: slope(x).sum())(x[0])
    torch.testing.assert_close(each, FF.normalize(x.flatten(0, 1), MEAN, STD).view(x.shape))
    std = torch.tensor(STD, device=DEVICE)[:, None, None]
    torch.testing.assert_close(curve, (2 / std**2).expand(2, 3, 4, 4))


# The layer.


def test_layer_leaves_keys_and_survives_casts_and_copies() -> None:
    layer = fastcnn.nn.Normalize(MEAN, STD)
    assert layer.state_dict() == {}
    for other in (
        copy.deepcopy(layer).half(),
        copy.deepcopy(layer).to("meta").to_empty(device=DEVICE),
        layer.to(DEVICE),
    ):
        assert other.mean.dtype == other.std.dtype == torch.float32
        torch.testing.assert_close(other.mean.cpu(), torch.tensor(MEAN), rtol=0, atol=0)
        torch.testing.assert_close(other.std.cpu(), torch.tensor(STD), rtol=0, atol=0)
    assert "mean=[0.485" in str(layer)
    with pytest.raises(ValueError, match="'std': expected no 0"):
        fastcnn.nn.Normalize(0.5, (0.1, 0.0))


def test_layer_in_float64_keeps_all_digits() -> None:
    x = torch.rand(1, 3, 2, 2, dtype=torch.float64)
    exact = (x - torch.tensor(MEAN, dtype=torch.float64)[:, None, None]) / torch.tensor(STD, dtype=torch.float64)[
        :, None, None
    ]
    torch.testing.assert_close(fastcnn.nn.Normalize(MEAN, STD)(x), exact, rtol=1e-15, atol=1e-15)


def test_layer_in_front_of_a_network_keeps_its_keys() -> None:
    model = fastcnn.MnistCNN()
    keys, x = list(model.state_dict()), torch.rand(2, 1, 28, 28)
    expected = model((x - 0.1307) / 0.3081)
    layers = OrderedDict(normalize=fastcnn.nn.Normalize(0.1307, 0.3081))
    layers.update(model.layer1.named_children())
    model.layer1 = fastcnn.nn.Sequential(layers)
    assert sorted(model.state_dict()) == sorted(keys)
    torch.testing.assert_close(model(x), expected)


def test_recorded_graphs_hold_torchs_operators() -> None:
    layer, x = fastcnn.nn.Normalize(MEAN, STD).to(DEVICE), images(2, 3, 4, 4)
    expected = FF.normalize(x, MEAN, STD)
    with fastcnn.use_backend("triton"):
        recorded = [
            torch.export.export(layer, (x,)).module(),
            torch.jit.trace(layer, x),
            torch.fx.symbolic_trace(nn.Sequential(layer)),
        ]
    for graph in recorded:
        torch.testing.assert_close(graph(x), expected)
        assert "torch.ops.fastcnn" not in str(getattr(graph, "code", ""))


def test_compiles_in_one_graph() -> None:
    layer = fastcnn.nn.Normalize(MEAN, STD).to(DEVICE)
    x = torch.rand(1, 3, 4, 4, device=DEVICE, requires_grad=True)
    with fastcnn.use_backend("triton"):
        run = torch.compile(layer, backend="aot_eager", fullgraph=True)
        (ours,) = torch.autograd.grad(run(x).sum(), x)
        (expected,) = torch.autograd.grad(layer(x).sum(), x)
    torch.testing.assert_close(ours, expected)


def test_opcheck() -> None:
    mean, std = constants(3)
    for x in (images(1, 3, 4, 4), torch.rand(1, 3, 4, 4, device=DEVICE).to(memory_format=FORMATS["channels_last"])):
        torch.library.opcheck(torch.ops.fastcnn.normalize.triton, (x, mean, std, DTYPES["bfloat16"]))
