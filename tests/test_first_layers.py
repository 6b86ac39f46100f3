"""The first layers of networks, convolutions of few input channels, by the algorithms made for them."""

from collections.abc import Callable
from typing import Any

import pytest
import test_conv_relu as plain
import test_conv_relu_pool as pooled
import torch
import torch.nn.functional as F
from parity import (
    COMPILED,
    DEVICE,
    FORMATS,
    assert_parity,
    assert_same,
    each_dtype,
    each_format,
    each_variant,
    specials,
)

import fastcnn
import fastcnn.functional as FF

ALGORITHMS = [("cuda", "direct")]
each_algorithm = pytest.mark.parametrize(
    "backend", [algorithm for algorithm in ALGORITHMS if (algorithm[0], None) in COMPILED], ids="-".join
)

# input, weight, settings. A tile of `direct` is 4 x 32 pixels, a block's channels are up to 64 (float32: 32).
CASES: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "VGG": ((2, 3, 6, 40), (64, 3, 3, 3), {"padding": 1}),
    "MNIST": ((3, 1, 14, 14), (32, 1, 3, 3), {"padding": 1}),
    "AlexNet": ((1, 3, 37, 35), (64, 3, 11, 11), {"stride": 4, "padding": 2}),
    "AlexNet2012": ((1, 3, 31, 35), (96, 3, 11, 11), {"stride": 4}),
    "AlexNet, 24 channels": ((2, 3, 27, 27), (24, 3, 11, 11), {"stride": 4, "padding": 2}),
    "ConvNet, 8x8/4": ((1, 3, 28, 36), (32, 3, 8, 8), {"stride": 4}),
    "7x7/2": ((1, 3, 15, 77), (16, 3, 7, 7), {"stride": 2, "padding": 3}),
    "5x5": ((2, 3, 9, 8), (20, 3, 5, 5), {"padding": 2}),
    "5x5, 48 channels": ((2, 3, 9, 8), (48, 3, 5, 5), {"padding": 2}),
    "two channels": ((1, 2, 5, 34), (8, 2, 3, 3), {"padding": 1}),
    "four channels": ((2, 4, 5, 7), (10, 4, 3, 3), {"padding": 1}),
    "three groups of two channels": ((2, 6, 6, 5), (24, 2, 3, 3), {"padding": 1, "groups": 3}),
    "two groups of many output channels": ((1, 4, 5, 5), (140, 2, 3, 3), {"groups": 2}),
    "depthwise": ((1, 5, 6, 6), (10, 1, 3, 3), {"groups": 5}),
    "dilation, strides and padding, not square": (
        (1, 3, 17, 19),
        (7, 3, 3, 2),
        {"stride": (2, 3), "padding": (1, 4), "dilation": (3, 2)},
    ),
    "even kernel, same": ((2, 3, 6, 7), (12, 3, 2, 4), {"padding": "same", "dilation": (1, 2)}),
    "1x1": ((1, 3, 3, 5), (9, 3, 1, 1), {}),
    "one tap more than a step": ((1, 3, 6, 9), (17, 3, 1, 5), {}),
    "channels that no vector divides": ((1, 3, 6, 35), (13, 3, 3, 3), {"padding": 1}),
    "many output channels": ((1, 3, 5, 4), (150, 3, 3, 3), {"padding": 1}),
    "padding over the kernel": ((1, 2, 3, 3), (3, 2, 2, 2), {"padding": 3}),
    "many tiles": ((3, 1, 13, 70), (8, 1, 3, 3), {}),
    "empty batch": ((0, 3, 6, 6), (4, 3, 3, 3), {"padding": 1}),
}

# A tile is 2 x 16 windows.
POOLED: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "MNIST": ((2, 1, 28, 28), (32, 1, 3, 3), {"padding": 1}),
    "VGG": ((1, 3, 8, 64), (64, 3, 3, 3), {"padding": 1}),
    "AlexNet's window": ((1, 3, 31, 35), (24, 3, 11, 11), {"stride": 4, "padding": 2}),
    "ConvNet, 8x8/4": ((1, 3, 28, 36), (32, 3, 8, 8), {"stride": 4}),
    "7x7/2 leaves a rest": ((1, 3, 14, 78), (16, 3, 7, 7), {"stride": 2, "padding": 3}),
    "odd sizes leave a rest": ((2, 3, 7, 37), (12, 3, 3, 3), {"padding": 1}),
    "a vector of windows": ((1, 2, 6, 16), (5, 2, 3, 3), {"padding": 1}),
    "channels that no vector divides": ((1, 3, 6, 10), (13, 3, 3, 3), {"padding": 1}),
    "groups": ((2, 6, 6, 8), (24, 2, 3, 3), {"padding": 1, "groups": 3}),
    "dilation, four channels": ((1, 4, 9, 8), (70, 4, 2, 3), {"dilation": 2}),
    "many tiles": ((2, 1, 15, 70), (8, 1, 3, 3), {"padding": 1}),
    "empty batch": ((0, 3, 6, 6), (4, 3, 3, 3), {"padding": 1}),
}

TWO_BY_TWO = {"kernel_size": 2}


def whole_numbers(tensors: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Return small whole numbers, whose sums are exact in every dtype: the winner of a window is one and the same."""
    return tuple(torch.randint_like(t, -2, 3) for t in tensors)


@each_algorithm
@each_variant(CASES)
def test_parity(case: Any, dtype: torch.dtype, format: torch.memory_format, backend: Any) -> None:
    input, weight, settings = case
    assert_parity(*plain.both(**settings), plain.tensors(input, weight, dtype, format), backend)


@each_algorithm
@each_variant(POOLED)
def test_parity_pooled(case: Any, dtype: torch.dtype, format: torch.memory_format, backend: Any) -> None:
    input, weight, settings = case
    given = plain.tensors(input, weight, dtype, format)
    if dtype != torch.float32:
        given = whole_numbers(given)
    assert_parity(*pooled.both(settings, TWO_BY_TWO), given, backend)


@each_algorithm
@each_dtype
def test_pooled_values_are_those_of_training(dtype: torch.dtype, backend: Any) -> None:
    x, w, b = plain.tensors((2, 3, 9, 36), (24, 3, 3, 3), dtype, torch.channels_last)
    with fastcnn.use_backend(backend[0], algorithm=backend[1]):
        training = FF.conv2d_relu_max_pool2d(x, w.requires_grad_(), b, pool_size=2)
        with torch.no_grad():
            inference = FF.conv2d_relu_max_pool2d(x, w, b, pool_size=2)
    assert torch.equal(training, inference)


@each_algorithm
@each_dtype
def test_without_bias(dtype: torch.dtype, backend: Any) -> None:
    x, w, _ = plain.tensors((2, 3, 6, 8), (16, 3, 3, 3), dtype, torch.contiguous_format)
    assert_parity(*plain.both(padding=1), (x, w, None), backend)
    x, w = whole_numbers((x, w))
    assert_parity(*pooled.both({"padding": 1}, TWO_BY_TWO), (x, w, None), backend)


@each_algorithm
@each_dtype
@pytest.mark.parametrize("formats", [("nchw", "channels_last"), ("channels_last", "nchw")], ids=str)
def test_input_and_weight_in_different_layouts(formats: tuple[str, str], dtype: torch.dtype, backend: Any) -> None:
    x, w, b = plain.tensors((2, 3, 6, 5), (16, 3, 3, 3), dtype, torch.contiguous_format)
    x, w = x.to(memory_format=FORMATS[formats[0]]), w.to(memory_format=FORMATS[formats[1]])
    assert_parity(*plain.both(padding=1), (x, w, b), backend)


@each_algorithm
@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, ::2],
        lambda x: x[:, :2, 1:, ::2],
        lambda x: x[:, :2].transpose(2, 3),
        lambda x: x[:, :1].expand(-1, 2, -1, -1),
    ],
    ids=["channels skipped", "pixels skipped", "transposed", "expanded"],
)
def test_views(view: Any, backend: Any) -> None:
    x, w, b = plain.tensors((2, 4, 7, 6), (6, 4, 3, 3), torch.float32, torch.contiguous_format)
    fast, stock = plain.both(padding=1)
    assert_parity(
        lambda x, w, b: fast(view(x), view(w).flip(0)[:3, :, :2], b[::2]),
        lambda x, w, b: stock(view(x), view(w).flip(0)[:3, :, :2], b[::2]),
        (x, w, b),
        backend,
    )


@each_algorithm
@each_dtype
def test_unbatched(dtype: torch.dtype, backend: Any) -> None:
    x, w, b = plain.tensors((1, 3, 6, 5), (4, 3, 3, 3), dtype, torch.contiguous_format)
    assert_parity(*plain.both(padding="same"), (x[0], w, b), backend)


@each_algorithm
@each_dtype
@each_format
def test_one_tap_passes_special_values(format: torch.memory_format, dtype: torch.dtype, backend: Any) -> None:
    x = specials(2, 1, 6, 34, dtype=dtype).to(memory_format=format)
    weight, bias = torch.ones(8, 1, 1, 1, device=DEVICE, dtype=dtype), torch.zeros(8, device=DEVICE, dtype=dtype)

    def stock(bias: torch.Tensor) -> torch.Tensor:  # torch's own convolutions may pad channels, and infinity with zero
        return F.relu(x.expand(-1, 8, -1, -1) + bias[:, None, None])

    def value_and_gradient(function: Callable[[torch.Tensor], torch.Tensor]) -> tuple[torch.Tensor, ...]:
        leaf = bias.clone().requires_grad_()
        output = function(leaf)
        return output, *torch.autograd.grad(output, leaf, torch.ones_like(output))

    expected = value_and_gradient(stock), value_and_gradient(lambda bias: F.max_pool2d(stock(bias), 2))
    with fastcnn.use_backend(backend[0], algorithm=backend[1]):
        actual = (
            value_and_gradient(lambda bias: FF.conv2d_relu(x, weight, bias)),
            value_and_gradient(lambda bias: FF.conv2d_relu_max_pool2d(x, weight, bias, pool_size=2)),
        )
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@each_algorithm
@each_dtype
@pytest.mark.parametrize("special", [float("nan"), float("inf")], ids=str)
def test_special_values_reach_only_the_windows_over_them(special: float, dtype: torch.dtype, backend: Any) -> None:
    x = torch.ones(1, 3, 8, 9, device=DEVICE, dtype=dtype)
    x[0, 1, 4, 5] = special
    weight, bias = torch.ones(8, 3, 3, 3, device=DEVICE, dtype=dtype), torch.ones(8, device=DEVICE, dtype=dtype)
    with torch.no_grad(), fastcnn.use_backend(backend[0], algorithm=backend[1]):
        output = FF.conv2d_relu(x, weight, bias, padding=1)
        halves = FF.conv2d_relu_max_pool2d(x, weight, bias, padding=1, pool_size=2)
    expected = plain.stock(x, weight, bias, padding=1)
    torch.testing.assert_close(output, expected, equal_nan=True)
    torch.testing.assert_close(halves, F.max_pool2d(expected, 2), equal_nan=True)


@each_algorithm
def test_no_gradient_where_relu_is_off(backend: Any) -> None:
    x, w, _ = plain.tensors((1, 2, 6, 6), (3, 2, 3, 3), torch.float32, torch.contiguous_format)
    low = torch.full((3,), -100.0, device=DEVICE)
    assert_same(*pooled.both({"padding": 1}, TWO_BY_TWO), (x, w, low), backend)


REFUSED: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any], str]] = {
    "20 channels": (
        (1, 20, 4, 4),
        (2, 20, 3, 3),
        {},
        "'input' with up to 4 channels per group, got 20",
    ),
    "a window over too large a patch": (
        (1, 3, 70, 70),
        (2, 3, 64, 64),
        {},
        "'weight' with a window .* up to 101376 bytes of shared memory, got 64 x 64 with stride 1 x 1",
    ),
    "sizes over 32 bits": (
        (1, 1, 2, 3),
        (2, 1, 2, 2),
        {"dilation": 2**33, "padding": 2**33},
        "'input' with less than 1073741824 rows",
    ),
    "a stride over too large a patch": (
        (1, 3, 9, 9),
        (2, 3, 3, 3),
        {"stride": 2**40},
        "'weight' with a window .* of shared memory",
    ),
}


@each_algorithm
@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_refused_by_name(case: Any, backend: Any) -> None:
    input, weight, settings, message = case
    x, w = torch.zeros(input, device=DEVICE), torch.zeros(weight, device=DEVICE)
    with fastcnn.use_backend(backend[0], algorithm=backend[1]), pytest.raises(RuntimeError, match=message):
        FF.conv2d_relu(x, w, **settings)
