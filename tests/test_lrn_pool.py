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


@each_backend
def test_special_values_go_through_as_in_torch(backend: Any) -> None:
    assert_same(*both({"size": 3, "alpha": 1.0}, {"kernel_size": 2}), (specials(2, 9, 4, 6),), backend)


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
