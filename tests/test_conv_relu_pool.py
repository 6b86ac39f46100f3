"""Convolution + bias + ReLU + max-pool against stock torch, by every algorithm."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from parity import (
    DEVICE,
    assert_parity,
    assert_same,
    each_convolution,
    each_dtype,
    each_format,
    each_variant,
    specials,
)
from test_conv_relu import tensors

import fastcnn.functional as FF

# input, weight, convolution's settings, pool's settings
CASES: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any], dict[str, Any]]] = {
    "3x3, 2x2": ((2, 5, 8, 6), (4, 5, 3, 3), {"padding": 1}, {"kernel_size": 2}),
    "11x11/4, 3x3/2": ((1, 3, 31, 35), (5, 3, 11, 11), {"stride": 4, "padding": 2}, {"kernel_size": 3, "stride": 2}),
    "odd sizes leave a rest": ((1, 3, 7, 9), (4, 3, 3, 3), {"padding": 1}, {"kernel_size": 2}),
    "ceil_mode": ((1, 3, 7, 9), (4, 3, 3, 3), {"padding": 1}, {"kernel_size": 2, "ceil_mode": True}),
    "padded pool, not square": (
        (2, 2, 8, 7),
        (3, 2, 3, 3),
        {},
        {"kernel_size": (3, 2), "stride": (1, 2), "padding": 1},
    ),
    "groups, same": ((1, 6, 6, 7), (9, 2, 2, 3), {"padding": "same", "groups": 3}, {"kernel_size": 2}),
    "one channel, as in MNIST": ((3, 1, 10, 10), (6, 1, 3, 3), {"padding": 1}, {"kernel_size": 2}),
    "many channels": ((1, 20, 6, 4), (70, 20, 3, 3), {"padding": 1}, {"kernel_size": 2}),
    "empty batch": ((0, 3, 6, 6), (4, 3, 3, 3), {"padding": 1}, {"kernel_size": 2}),
    "stride over a window's width": ((1, 2, 7, 8), (3, 2, 3, 3), {}, {"kernel_size": (2, 1), "stride": (1, 2)}),
    "whole vectors": ((2, 3, 6, 7), (16, 3, 3, 3), {"padding": 1}, {"kernel_size": 2}),
    "whole vectors, 3x3/2": ((2, 3, 9, 8), (16, 3, 3, 3), {"padding": 1}, {"kernel_size": 3, "stride": 2}),
    "partial windows, 3x3/2": (
        (1, 2, 8, 6),
        (8, 2, 3, 3),
        {"padding": 1},
        {"kernel_size": 3, "stride": 2, "ceil_mode": True},
    ),
    "whole rows of pairs": ((2, 3, 6, 16), (5, 3, 3, 3), {"padding": 1}, {"kernel_size": 2}),
    "whole vectors, any window": ((1, 2, 6, 7), (8, 2, 3, 3), {}, {"kernel_size": (3, 2), "padding": 1}),
    "many pixels": ((2, 1, 40, 44), (8, 1, 1, 1), {}, {"kernel_size": 2}),
}


def stock(input: Any, weight: Any, bias: Any = None, *, pool: dict[str, Any], **settings: Any) -> torch.Tensor:
    return F.max_pool2d(F.relu(F.conv2d(input, weight, bias, **settings)), **pool)


def both(settings: dict[str, Any], pool: dict[str, Any]) -> tuple[Any, Any]:
    """Return fastcnn's function and torch's with these settings."""
    names = {
        "kernel_size": "pool_size",
        "stride": "pool_stride",
        "padding": "pool_padding",
        "ceil_mode": "pool_ceil_mode",
    }
    renamed = {names[key]: value for key, value in pool.items()}
    return partial(FF.conv2d_relu_max_pool2d, **settings, **renamed), partial(stock, pool=pool, **settings)


@each_convolution
@each_variant(CASES)
def test_parity(case: Any, dtype: torch.dtype, format: torch.memory_format, backend: Any) -> None:
    input, weight, settings, pool = case
    given = tensors(input, weight, dtype, format)
    if dtype != torch.float32:
        # Rounding would make two values of a window equal in one place and not in another: either wins rightly, and
        # the gradient goes elsewhere. Small whole numbers are exact in every dtype, so that one winner is right.
        given = tuple(torch.randint_like(t, -2, 3) for t in given)
    assert_parity(*both(settings, pool), given, backend)


@each_convolution
@each_dtype
def test_rounding(dtype: torch.dtype, backend: Any) -> None:
    x, w, b = tensors((2, 9, 8, 6), (4, 9, 3, 3), dtype, torch.channels_last)
    x, w = x.bfloat16().to(dtype), w.bfloat16().to(dtype)  # exact in TF32 too
    fast, plain = both({"padding": 1}, {"kernel_size": 2})
    # the bias' gradient is a sum over all winners, whichever they are
    assert_parity(lambda b: fast(x, w, b), lambda b: plain(x.to(b), w.to(b), b), (b,), backend)


@each_convolution
@each_format
def test_without_bias(format: torch.memory_format, backend: Any) -> None:
    x, w, _ = tensors((2, 3, 6, 5), (4, 3, 3, 3), torch.float32, format)
    assert_parity(*both({"padding": 1}, {"kernel_size": 2}), (x, w, None), backend)


@each_convolution
def test_unbatched(backend: Any) -> None:
    x, w, b = tensors((1, 3, 6, 5), (4, 3, 3, 3), torch.float32, torch.contiguous_format)
    assert_parity(*both({"padding": 1}, {"kernel_size": 2}), (x[0], w, b), backend)


@each_convolution
@each_format
def test_special_values_go_through_as_in_torch(format: torch.memory_format, backend: Any) -> None:
    x = specials(2, 1, 8, 7).to(memory_format=format)
    weight = torch.ones(3, 1, 1, 1, device=DEVICE)  # one product a pixel: no order of summation to differ in
    assert_same(*both({}, {"kernel_size": 3, "stride": 2}), (x, weight, torch.zeros(3, device=DEVICE)), backend)


@each_convolution
def test_no_gradient_where_relu_is_off(backend: Any) -> None:
    x, w, _ = tensors((1, 2, 6, 6), (3, 2, 3, 3), torch.float32, torch.contiguous_format)
    low = torch.full((3,), -100.0, device=DEVICE)
    assert_same(*both({"padding": 1}, {"kernel_size": 2}), (x, w, low), backend)


def test_reference_gradient() -> None:
    x, w, b = (
        t.double().requires_grad_() for t in tensors((1, 2, 5, 4), (2, 2, 3, 3), torch.float32, torch.channels_last)
    )
    assert torch.autograd.gradcheck(partial(FF.conv2d_relu_max_pool2d, padding=1, pool_size=2), (x, w, b))


@each_convolution
@each_format
@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (1, 8, 2, 16)], ids=["single", "vectors"])
def test_values_that_round_to_the_same_are_equal(
    shape: tuple[int, ...], format: torch.memory_format, backend: Any
) -> None:
    x = torch.tensor([0.25, 0.5], dtype=torch.bfloat16, device=DEVICE).repeat(1, 1, shape[2], shape[3] // 2)
    weight = torch.ones(shape[1], 1, 1, 1, dtype=torch.bfloat16, device=DEVICE).to(memory_format=format)
    bias = torch.full(shape[1:2], 256.0, dtype=torch.bfloat16, device=DEVICE)  # sums differ by less than half a place
    pool = {"kernel_size": (min(shape[2], 2), 2)}
    assert_same(*both({}, pool), (x.to(memory_format=format), weight, bias), backend)


@pytest.mark.parametrize("channels", [1, 3])
def test_more_activations_than_a_cache_holds(channels: int) -> None:
    """On the CPU they are channels_last before the pool; whole numbers leave no winner to chance."""
    shapes = ((2, channels, 365, 361), (8, channels, 3, 3), (8,))
    given = [torch.randint(-2, 3, shape).float().to(DEVICE) for shape in shapes]
    backend = ("cpu" if DEVICE == "cpu" else "cuda", None)
    assert_parity(*both({"padding": 1}, {"kernel_size": 3, "stride": 2}), given, backend)
