"""LRN + max-pool against stock torch."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from parity import (
    DEVICE,
    assert_parity,
    assert_same,
    each_backend,
    each_case,
    each_compiled,
    each_format,
    each_variant,
    new,
    specials,
)
from test_lrn import stock as stock_lrn

import fastcnn.functional as FF

# input, LRN's settings, pool's settings
CASES: dict[str, tuple[tuple[int, ...], dict[str, Any], dict[str, Any]]] = {
    "AlexNet's": ((2, 7, 7, 5), {"size": 5, "alpha": 1e-4, "beta": 0.75, "k": 2.0}, {"kernel_size": 3, "stride": 2}),
    "strong, 2x2": ((1, 6, 4, 6), {"size": 5, "alpha": 3.0}, {"kernel_size": 2}),
    "even size, any beta": (
        (1, 5, 4, 5),
        {"size": 4, "alpha": 2.0, "beta": 0.6},
        {"kernel_size": 2, "ceil_mode": True},
    ),
    "padded pool": ((1, 4, 5, 4), {"size": 3, "alpha": 2.0}, {"kernel_size": (3, 2), "stride": (2, 1), "padding": 1}),
    "size not unrolled": ((1, 10, 3, 3), {"size": 9, "alpha": 2.0}, {"kernel_size": 2}),
    "channels over one block": ((1, 70, 3, 2), {"size": 5, "alpha": 2.0}, {"kernel_size": 2}),
    "empty batch": ((0, 3, 4, 4), {"size": 3}, {"kernel_size": 2}),
}


def stock(input: torch.Tensor, *, pool: dict[str, Any], **settings: Any) -> torch.Tensor:
    return F.max_pool2d(stock_lrn(input, **settings), **pool)


def both(settings: dict[str, Any], pool: dict[str, Any]) -> tuple[Any, Any]:
    """Return fastcnn's function and torch's with these settings."""
    names = {
        "kernel_size": "pool_size",
        "stride": "pool_stride",
        "padding": "pool_padding",
        "ceil_mode": "pool_ceil_mode",
    }
    renamed = {names[key]: value for key, value in pool.items()}
    return partial(FF.local_response_norm_max_pool2d, **settings, **renamed), partial(stock, pool=pool, **settings)


@each_backend
@each_variant(CASES)
def test_parity(case: Any, dtype: torch.dtype, format: torch.memory_format, backend: Any) -> None:
    shape, settings, pool = case
    assert_parity(*both(settings, pool), (new(*shape, dtype=dtype, format=format),), backend)


# The usual LRN, which has kernels of its own, over as many channels as their vectors hold and not.
USUAL: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "overlapping windows": ((2, 24, 7, 5), {"kernel_size": 3, "stride": 2}),
    "overlapping runs": ((1, 22, 7, 5), {"kernel_size": 3, "stride": 2, "padding": 1}),
    "several tiles of windows": ((1, 40, 31, 9), {"kernel_size": 3, "stride": 2, "ceil_mode": True}),
    "vectors of floats": ((1, 20, 5, 4), {"kernel_size": 2, "ceil_mode": True}),
    "several tiles": ((1, 24, 6, 37), {"kernel_size": 2, "stride": 1}),
    "several tiles of channels": ((1, 72, 4, 3), {"kernel_size": 2, "padding": 1}),
}


@each_backend
@each_variant(USUAL, whole=len(USUAL))
def test_usual_lrn(format: torch.memory_format, dtype: torch.dtype, case: Any, backend: Any) -> None:
    shape, pool = case
    assert_parity(*both({"size": 5, "alpha": 2.0}, pool), (new(*shape, dtype=dtype, format=format),), backend)


@each_compiled
@each_format
def test_large_window(format: torch.memory_format, backend: Any) -> None:
    x = new(1, 32, 25, 21, dtype=torch.float32, format=format)
    assert_parity(*both({"size": 5, "alpha": 2.0}, {"kernel_size": 11, "stride": 2}), (x,), backend)


# input, size of LRN, size and dilation of pool; torch's arguments allow no dilation here, the operators do
DILATED = {
    "vectors": ((1, 24, 7, 6), 5, (2, 3), (3, 2)),
    "elements": ((1, 5, 7, 6), 3, (2, 3), (3, 2)),
    "few channels at a time": ((1, 24, 42, 41), 5, (2, 2), (40, 39)),
    "too large to keep": ((1, 8, 61, 62), 5, (2, 2), (60, 60)),
}


@each_compiled
@each_case(DILATED)
@each_format
def test_dilated_pool(format: torch.memory_format, case: Any, backend: Any) -> None:
    shape, size, kernel, dilation = case
    norm, window = (size, 2.0, 0.75, 1.0), (kernel, (2, 1), (1, 1), dilation, False)
    numbers = [*kernel, 2, 1, 1, 1, *dilation, 0]
    ours = torch.ops.fastcnn
    x = new(*shape, dtype=torch.float32, format=format).requires_grad_()
    expected = F.max_pool2d(F.local_response_norm(x, *norm), *window)
    cotangent = torch.randn_like(expected)
    (gradient,) = torch.autograd.grad(expected, x, cotangent)
    values, codes = getattr(ours.lrn_pool_codes, backend[0])(x.detach(), *norm, numbers)
    torch.testing.assert_close(values, expected.detach())
    torch.testing.assert_close(getattr(ours.lrn_pool, backend[0])(x.detach(), *norm, numbers), values)
    back = getattr(ours.lrn_pool_backward, backend[0])(cotangent, codes, x.detach(), *norm, numbers)
    torch.testing.assert_close(back, gradient, rtol=1e-5, atol=1e-5)


@each_backend
@each_format
def test_special_values_go_through_as_in_torch(format: torch.memory_format, backend: Any) -> None:
    assert_same(*both({"size": 3, "alpha": 1.0}, {"kernel_size": 2}), (specials(2, 9, 4, 6),), backend)
    x = specials(2, 24, 4, 6).to(memory_format=format)
    assert_same(*both({"size": 5, "alpha": 1.0}, {"kernel_size": 2}), (x,), backend)


def test_reference_gradient() -> None:
    x = torch.randn(1, 4, 4, 4, dtype=torch.float64, requires_grad=True, device=DEVICE)
    function = partial(FF.local_response_norm_max_pool2d, size=3, alpha=2.0, pool_size=2)
    assert torch.autograd.gradcheck(function, (x,))


@each_backend
def test_values_that_round_to_the_same_are_equal(backend: Any) -> None:
    # float16, as Triton's interpreter truncates to bfloat16
    x = torch.tensor([2046 / 1024, 2047 / 1024], dtype=torch.float16, device=DEVICE).view(1, 1, 1, 2)
    halved = {"size": 1, "alpha": 0.0, "beta": 1.0, "k": 1.99828}  # to 0.9999 and 1.0004: both are 1 in float16
    assert_same(*both(halved, {"kernel_size": (1, 2)}), (x,), backend)


@each_backend
@each_format
def test_gradient_of_a_window_of_negative_infinities(format: torch.memory_format, backend: Any) -> None:
    # float16 overflows where the normalized value is larger than the value
    x = torch.full((1, 24, 2, 4), -6e4, dtype=torch.float16, device=DEVICE).to(memory_format=format)
    assert_same(*both({"size": 5, "alpha": 0.0, "k": 0.1}, {"kernel_size": 2}), (x,), backend)
