"""First layers by the Triton algorithms `packed` and `space_to_depth`: every case against stock torch."""

from typing import Any

import pytest
import test_conv_relu as plain
import test_conv_relu_pool as pooled
import torch
import torch.nn.functional as F
from parity import (
    DEVICE,
    FORMATS,
    assert_parity,
    assert_same,
    each_dtype,
    each_format,
    each_variant,
    last_place,
    mostly_sweep,
    new,
)

import fastcnn
import fastcnn.functional as FF
from fastcnn.shapes import Window
from fastcnn.triton import tiles
from fastcnn.triton.convolution import first_layers
from fastcnn.triton.convolution.implicit_gemm import Config, Convolution

PACKED, DEEP = ("triton", "packed"), ("triton", "space_to_depth")

# input, weight, settings
CASES: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "1x1": ((1, 2, 3, 5), (9, 2, 1, 1), {}),
    "VGG": ((2, 3, 6, 9), (20, 3, 3, 3), {"padding": 1}),
    "MNIST": ((3, 1, 9, 10), (12, 1, 3, 3), {"padding": 1}),
    "AlexNet, many steps of K": ((1, 3, 27, 23), (17, 3, 11, 11), {"stride": 4, "padding": 2}),
    "dilation, strides and padding, not square": (
        (1, 3, 17, 19),
        (7, 3, 3, 2),
        {"stride": (2, 3), "padding": (1, 4), "dilation": (3, 2)},
    ),
    "even kernel, same": ((2, 3, 6, 7), (5, 3, 2, 4), {"padding": "same", "dilation": (1, 2)}),
    "four channels, more outputs than a block": ((1, 4, 5, 7), (70, 4, 3, 3), {"padding": 1}),
    "padding over the kernel": ((1, 2, 3, 3), (3, 2, 2, 2), {"padding": 3}),
    "empty batch": ((0, 3, 6, 6), (4, 3, 3, 3), {"padding": 1}),
}
STRIDED: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "AlexNet": ((2, 3, 27, 23), (17, 3, 11, 11), {"stride": 4, "padding": 2}),
    "7x7/2": ((1, 3, 15, 17), (16, 3, 7, 7), {"stride": 2, "padding": 3}),
    "8x8/4, whole blocks": ((1, 3, 20, 24), (8, 3, 8, 8), {"stride": 4}),
    "one stride": ((2, 3, 6, 9), (5, 3, 3, 2), {"stride": (1, 2), "padding": (1, 0)}),
    "stride over the kernel": ((1, 2, 11, 9), (3, 2, 2, 2), {"stride": (5, 3)}),
    "padding over the kernel": ((1, 2, 3, 3), (3, 2, 2, 2), {"padding": 3, "stride": 2}),
    "more channels": ((1, 20, 7, 6), (9, 20, 3, 3), {"stride": 2, "padding": 1}),
    "empty batch": ((0, 3, 6, 6), (4, 3, 3, 3), {"stride": 2}),
}
POOLED = {
    "VGG": (PACKED, (1, 3, 8, 7), (10, 3, 3, 3), {"padding": 1}, {"kernel_size": 2}),
    "MNIST": (PACKED, (2, 1, 10, 10), (6, 1, 3, 3), {"padding": 1}, {"kernel_size": 2}),
    "AlexNet": (DEEP, (1, 3, 31, 35), (5, 3, 11, 11), {"stride": 4, "padding": 2}, {"kernel_size": 3, "stride": 2}),
}


@each_variant(CASES)
def test_packed(case: Any, dtype: torch.dtype, format: torch.memory_format) -> None:
    input, weight, settings = case
    assert_parity(*plain.both(**settings), plain.tensors(input, weight, dtype, format), PACKED)


@each_variant(STRIDED)
def test_space_to_depth(case: Any, dtype: torch.dtype, format: torch.memory_format) -> None:
    input, weight, settings = case
    assert_parity(*plain.both(**settings), plain.tensors(input, weight, dtype, format), DEEP)


@each_variant(POOLED)
def test_pooled(case: Any, dtype: torch.dtype, format: torch.memory_format) -> None:
    backend, input, weight, settings, pool = case
    given = plain.tensors(input, weight, dtype, format)
    if dtype != torch.float32:  # whole numbers: the winner of a window is one and the same
        given = tuple(torch.randint_like(t, -2, 3) for t in given)
    assert_parity(*pooled.both(settings, pool), given, backend)


each_algorithm = pytest.mark.parametrize("backend", [PACKED, DEEP], ids="-".join)


@each_algorithm
@each_format
def test_without_bias_and_without_batch(format: torch.memory_format, backend: Any) -> None:
    x, w, b = plain.tensors((2, 3, 6, 8), (5, 3, 3, 3), torch.bfloat16, format)
    assert_parity(*plain.both(stride=2, padding=1), (x, w, None), backend)
    assert_parity(*plain.both(stride=2), (x[0], w, b), backend)


@each_algorithm
@pytest.mark.parametrize("formats", [("nchw", "channels_last"), ("channels_last", "nchw")], ids=str)
def test_input_and_weight_in_different_layouts(formats: tuple[str, str], backend: Any) -> None:
    x, w, b = plain.tensors((2, 3, 6, 5), (4, 3, 3, 3), torch.bfloat16, torch.contiguous_format)
    x, w = x.to(memory_format=FORMATS[formats[0]]), w.to(memory_format=FORMATS[formats[1]])
    assert_parity(*plain.both(stride=2, padding=1), (x, w, b), backend)


@each_algorithm
def test_views(backend: Any) -> None:
    x, w, b = plain.tensors((2, 4, 7, 9), (6, 3, 3, 3), torch.bfloat16, torch.contiguous_format)
    fast, stock = plain.both(stride=2)
    assert_parity(
        lambda x, w, b: fast(x[:, 1:, :, ::2].transpose(2, 3), w.flip(0)[:, :, :2], b),
        lambda x, w, b: stock(x[:, 1:, :, ::2].transpose(2, 3), w.flip(0)[:, :, :2], b),
        (x, w, b),
        backend,
    )


@each_algorithm
@each_dtype
@pytest.mark.parametrize("special", [float("nan"), float("inf")], ids=str)
def test_special_values_reach_only_the_windows_over_them(special: float, dtype: torch.dtype, backend: Any) -> None:
    x = torch.ones(1, 3, 8, 9, device=DEVICE, dtype=dtype)
    x[0, 1, 4, 5] = special
    # 2x2/2: no window of stock's reaches past its blocks, where zeros of ours would meet an infinity
    weight, bias = torch.ones(8, 3, 2, 2, device=DEVICE, dtype=dtype), torch.ones(8, device=DEVICE, dtype=dtype)
    with torch.no_grad(), fastcnn.use_backend(backend[0], algorithm=backend[1]):
        output = FF.conv2d_relu(x, weight, bias, stride=2, padding=1)
    torch.testing.assert_close(output, plain.stock(x, weight, bias, stride=2, padding=1), equal_nan=True)


@each_algorithm
def test_no_gradient_where_relu_is_off(backend: Any) -> None:
    x, w, _ = plain.tensors((1, 2, 6, 6), (3, 2, 3, 3), torch.float32, torch.contiguous_format)
    assert_same(*plain.both(stride=2), (x, w, torch.full((3,), -100.0, device=DEVICE)), backend)


REFUSED: dict[str, tuple[Any, tuple[int, ...], tuple[int, ...], dict[str, Any], str]] = {
    "five channels": (PACKED, (1, 5, 4, 4), (2, 5, 3, 3), {}, "'input' with up to 4 channels, got 5"),
    "packed groups": (PACKED, (1, 4, 4, 4), (2, 2, 3, 3), {"groups": 2}, "'groups' = 1, got 2"),
    "stride 1": (DEEP, (1, 3, 4, 4), (2, 3, 3, 3), {}, "'stride' over 1, got"),
    "dilation": (DEEP, (1, 3, 9, 9), (2, 3, 3, 3), {"stride": 2, "dilation": 2}, "'dilation' = "),
    "groups": (DEEP, (1, 4, 4, 4), (2, 2, 3, 3), {"stride": 2, "groups": 2}, "'groups' = 1, got 2"),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_refused_by_name(case: Any) -> None:
    backend, input, weight, settings, message = case
    x, w = torch.zeros(input, device=DEVICE), torch.zeros(weight, device=DEVICE)
    with (
        fastcnn.use_backend(backend[0], algorithm=backend[1]),
        pytest.raises(RuntimeError, match=f"backend 'triton' by '{backend[1]}' takes argument {message}"),
    ):
        FF.conv2d_relu(x, w, **settings)


@pytest.mark.parametrize("config", mostly_sweep(first_layers.CONFIGS), ids=str)
@each_dtype
def test_every_tile_of_packed(config: Config, dtype: torch.dtype) -> None:
    x, weight, bias = new(2, 3, 9, 8, dtype=dtype), new(22, 3, 4, 3, dtype=dtype) / 6, new(22, dtype=dtype)
    window = Window((4, 3), (2, 1), (1, 1), (1, 2), False)
    ours = first_layers.packed(Convolution(x, weight, bias, window, 1, True, config))
    settings = (window.stride, window.padding, window.dilation)
    exact = F.relu(F.conv2d(x.double(), weight.double(), bias.double(), *settings))
    stock = F.relu(F.conv2d(x, weight, bias, *settings))
    allowed = 2 * (stock.double() - exact).abs().max() + last_place(exact, dtype)
    assert (ours.double() - exact).abs().max() <= allowed


def test_a_configuration_by_name() -> None:
    x, w, b = plain.tensors((1, 3, 7, 9), (5, 3, 3, 3), torch.bfloat16, torch.contiguous_format)
    for algorithm in ("packed:64x16x32w4s1", "space_to_depth:64x32x32w4s3"):
        assert_parity(*plain.both(stride=2), (x, w, b), ("triton", algorithm))


@each_algorithm
@each_format
def test_offsets_of_64_bits(format: torch.memory_format, backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "WIDE_FROM", 1)  # as if one image had 2**31 elements
    x, w, b = plain.tensors((2, 3, 7, 6), (4, 3, 3, 3), torch.bfloat16, format)
    assert_parity(*plain.both(stride=2, padding=1), (x, w, b), backend)
