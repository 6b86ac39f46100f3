"""Normalization joined with convolution, ReLU and max-pool, against its layers run by stock torch."""

from typing import Any

import torch
from parity import assert_parity, each_variant
from test_normalize_conv_relu import DEEP, PACKED, assert_joined, assert_values, parameters, pictures, stage, stock

# algorithm, input, weight, settings, pool
CASES: dict[str, tuple[Any, tuple[int, ...], tuple[int, ...], dict[str, Any], dict[str, Any]]] = {
    "MNIST": (PACKED, (2, 1, 10, 10), (6, 1, 3, 3), {"padding": 1}, {"kernel_size": 2}),
    "AlexNet": (DEEP, (1, 3, 31, 35), (5, 3, 11, 11), {"stride": 4, "padding": 2}, {"kernel_size": 3, "stride": 2}),
    "ceil_mode, padded": (
        PACKED,
        (1, 3, 7, 9),
        (4, 3, 3, 3),
        {"padding": 1},
        {"kernel_size": 3, "stride": 2, "padding": 1, "ceil_mode": True},
    ),
    "empty batch": (PACKED, (0, 3, 6, 6), (4, 3, 3, 3), {}, {"kernel_size": 2}),
}


@each_variant(CASES)
def test_bytes(case: Any, dtype: torch.dtype, format: torch.memory_format) -> None:
    backend, input, weight, settings, pool = case
    x = pictures(*input, format=format)
    w, b = parameters(weight, dtype, format)
    fast, plain = stage(input[1], settings, pool), stock(settings, pool)
    assert_joined(fast, backend, x, w, b)
    if dtype != torch.float32:
        assert_values(fast, plain, (x, w, b), backend)
        # whole and half numbers, whose sums are exact in every dtype: one winner is right
        x, w, b = x // 128 * 255, torch.randint_like(w, -2, 3), torch.randint_like(b, -2, 3)
    assert_parity(lambda w, b: fast(x, w, b), lambda w, b: plain(x, w, b), (w, b), backend)
