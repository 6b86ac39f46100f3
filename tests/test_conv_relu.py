"""Convolution + bias + ReLU against stock torch, by every algorithm and configuration."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from parity import (
    DEVICE,
    FORMATS,
    assert_parity,
    assert_same,
    each_convolution,
    each_format,
    each_variant,
    new,
    specials,
)

import fastcnn
import fastcnn.functional as FF

# input, weight, settings
CASES: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "3x3": ((2, 5, 7, 6), (4, 5, 3, 3), {"padding": 1}),
    "1x1": ((2, 6, 5, 3), (7, 6, 1, 1), {}),
    "11x11/4 of 3 channels": ((1, 3, 23, 27), (5, 3, 11, 11), {"stride": 4, "padding": 2}),
    "one channel": ((3, 1, 8, 7), (6, 1, 3, 3), {"padding": 1}),
    "stride, padding, dilation, not square": (
        (1, 4, 11, 9),
        (3, 4, 3, 2),
        {"stride": (2, 1), "padding": (1, 3), "dilation": (2, 3)},
    ),
    "groups": ((2, 6, 6, 5), (9, 2, 3, 3), {"padding": 1, "groups": 3}),
    "depthwise": ((1, 5, 6, 6), (10, 1, 3, 3), {"groups": 5}),
    "same, odd kernel": ((1, 3, 6, 7), (4, 3, 3, 5), {"padding": "same"}),
    "same, even kernel": ((2, 3, 6, 7), (4, 3, 2, 4), {"padding": "same", "dilation": (1, 2)}),
    "valid": ((1, 3, 6, 7), (4, 3, 3, 3), {"padding": "valid"}),
    "padding over the kernel": ((1, 2, 3, 3), (3, 2, 2, 2), {"padding": 3}),
    "many channels": ((1, 40, 5, 4), (70, 40, 3, 3), {"padding": 1}),
    "empty batch": ((0, 3, 6, 6), (4, 3, 3, 3), {"padding": 1}),
    "whole vectors": ((2, 3, 7, 5), (16, 3, 3, 3), {"padding": 1}),
    "whole rows of vectors": ((2, 3, 4, 6), (5, 3, 3, 3), {"padding": 1}),
}


def stock(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, **settings: Any) -> torch.Tensor:
    return F.relu(F.conv2d(input, weight, bias, **settings))


def both(**settings: Any) -> tuple[Any, Any]:
    """Return fastcnn's function and torch's with these settings."""
    return partial(FF.conv2d_relu, **settings), partial(stock, **settings)


def tensors(
    input: tuple[int, ...], weight: tuple[int, ...], dtype: torch.dtype, format: Any
) -> tuple[torch.Tensor, ...]:
    """Return an input, a weight scaled to keep the variance, and a bias."""
    fan_in = weight[1] * weight[2] * weight[3]
    w = new(*weight, dtype=dtype, format=format) / fan_in**0.5
    return new(*input, dtype=dtype, format=format), w, new(weight[0], dtype=dtype)


@each_convolution
@each_variant(CASES)
def test_parity(case: Any, dtype: torch.dtype, format: torch.memory_format, backend: Any) -> None:
    input, weight, settings = case
    assert_parity(*both(**settings), tensors(input, weight, dtype, format), backend)


@each_convolution
@each_format
def test_without_bias(format: torch.memory_format, backend: Any) -> None:
    x, w, _ = tensors((2, 3, 6, 5), (4, 3, 3, 3), torch.float32, format)
    assert_parity(*both(padding=1), (x, w, None), backend)


@each_convolution
@pytest.mark.parametrize("formats", [("nchw", "channels_last"), ("channels_last", "nchw")], ids=str)
def test_input_and_weight_in_different_layouts(formats: tuple[str, str], backend: Any) -> None:
    x, w, b = tensors((2, 3, 6, 5), (4, 3, 3, 3), torch.float32, torch.contiguous_format)
    x, w = x.to(memory_format=FORMATS[formats[0]]), w.to(memory_format=FORMATS[formats[1]])
    assert_parity(*both(padding=1), (x, w, b), backend)


@each_convolution
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
    x, w, b = tensors((2, 4, 7, 6), (3, 2, 3, 3), torch.float32, torch.contiguous_format)
    fast, plain = both(padding=1)
    assert_parity(lambda x, w, b: fast(view(x), w, b), lambda x, w, b: plain(view(x), w, b), (x, w, b), backend)


@each_convolution
def test_unbatched(backend: Any) -> None:
    x, w, b = tensors((1, 3, 6, 5), (4, 3, 3, 3), torch.float32, torch.contiguous_format)
    assert_parity(*both(padding="same"), (x[0], w, b), backend)


@each_convolution
@each_format
def test_memory_that_is_not_aligned(format: torch.memory_format, backend: Any) -> None:
    x, w, b = tensors((2, 3, 6, 8), (16, 3, 3, 3), torch.float32, format)
    fast, plain = both(padding=1)
    longer = torch.cat([b[:1], b])
    assert_parity(lambda x, w, b: fast(x, w, b[1:]), lambda x, w, b: plain(x, w, b[1:]), (x, w, longer), backend)


@each_convolution
@each_format
def test_more_pixels_than_a_block(format: torch.memory_format, backend: Any) -> None:
    x, w, b = tensors((1, 1, 41, 53), (8, 1, 1, 1), torch.float32, format)
    assert_parity(*both(), (x, w, b), backend)


@each_convolution
@each_format
def test_bias_gradient_repeats(format: torch.memory_format, backend: Any) -> None:
    x, w, b = tensors((3, 2, 33, 31), (8, 2, 3, 3), torch.float32, format)
    b.requires_grad_()
    grad = new(3, 8, 33, 31, dtype=torch.float32, format=format)
    with fastcnn.use_backend(backend[0], algorithm=backend[1]):
        output = FF.conv2d_relu(x, w, b, padding=1)
        first, second = (torch.autograd.grad(output, b, grad, retain_graph=True)[0] for _ in range(2))
    assert first.equal(second)


@each_convolution
def test_special_values_go_through_as_in_torch(backend: Any) -> None:
    weight = torch.ones(3, 1, 1, 1, device=DEVICE)  # one product a pixel: no order of summation to differ in
    assert_same(*both(), (specials(2, 1, 6, 5), weight, torch.zeros(3, device=DEVICE)), backend)


def test_reference_gradient() -> None:
    x, w, b = (
        t.double().requires_grad_() for t in tensors((1, 2, 5, 4), (2, 2, 3, 3), torch.float32, torch.channels_last)
    )
    assert torch.autograd.gradcheck(partial(FF.conv2d_relu, padding=1), (x, w, b))
