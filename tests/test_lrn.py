"""Local response normalization against stock torch."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import (
    DEVICE,
    FORMATS,
    assert_parity,
    assert_same,
    each_backend,
    each_dtype,
    each_format,
    each_variant,
    new,
    specials,
)

import fastcnn.functional as FF

CASES: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "AlexNet's constants": ((2, 7, 5, 3), {"size": 5, "alpha": 1e-4, "beta": 0.75, "k": 2.0}),
    "torch's defaults": ((2, 7, 5, 3), {"size": 5}),
    "strong": ((2, 7, 5, 3), {"size": 5, "alpha": 3.0, "beta": 0.75, "k": 1.0}),
    "even size": ((2, 6, 4, 3), {"size": 4, "alpha": 2.0}),
    "size 1": ((1, 3, 4, 3), {"size": 1, "alpha": 2.0}),
    "size over the channels": ((1, 3, 2, 3), {"size": 9, "alpha": 2.0}),
    "even size over the channels": ((1, 3, 2, 3), {"size": 8, "alpha": 2.0}),
    "last size that misses a channel": ((1, 4, 2, 3), {"size": 6, "alpha": 2.0}),
    "size not unrolled": ((1, 12, 2, 3), {"size": 11, "alpha": 2.0}),
    "beta 0.5": ((1, 6, 4, 3), {"size": 3, "alpha": 2.0, "beta": 0.5}),
    "beta 1": ((1, 6, 4, 3), {"size": 3, "alpha": 2.0, "beta": 1.0}),
    "beta 0": ((1, 6, 4, 3), {"size": 3, "alpha": 2.0, "beta": 0.0}),
    "usual window, beta 0.5": ((1, 6, 4, 3), {"size": 5, "alpha": 2.0, "beta": 0.5}),
    "usual window, beta 0": ((1, 6, 4, 3), {"size": 5, "alpha": 2.0, "beta": 0.0}),
    "negative beta": ((1, 6, 4, 3), {"size": 3, "alpha": 2.0, "beta": -0.3}),
    "channels over one block": ((1, 70, 3, 1), {"size": 5, "alpha": 2.0}),
    "one channel": ((2, 1, 4, 3), {"size": 5, "alpha": 2.0}),
    "three axes": ((2, 6, 5), {"size": 3, "alpha": 2.0}),
    "five axes": ((1, 5, 2, 3, 2), {"size": 3, "alpha": 2.0}),
    "empty batch": ((0, 3, 4, 4), {"size": 3}),
}


def stock(input: torch.Tensor, **settings: Any) -> torch.Tensor:
    """Run torch's LRN; on the CPU it has none in half precision, so there float32's, rounded: a stricter measure."""
    if input.device.type == "cpu" and input.dtype in (torch.float16, torch.bfloat16):
        return F.local_response_norm(input.float(), **settings).to(input.dtype)
    return F.local_response_norm(input, **settings)


def both(**settings: Any) -> tuple[Any, Any]:
    """Return fastcnn's function and torch's with these settings."""
    return partial(FF.local_response_norm, **settings), partial(stock, **settings)


@each_backend
@each_variant(CASES)
def test_parity(case: Any, dtype: torch.dtype, format: torch.memory_format, backend: Any) -> None:
    shape, settings = case
    assert_parity(*both(**settings), (new(*shape, dtype=dtype, format=format),), backend)


# The usual window, which has kernels of its own, over as many channels as their vectors hold and not.
USUAL = {
    "vectors": (1, 24, 3, 2),
    "vectors of floats": (1, 20, 3, 2),
    "no vectors": (1, 17, 3, 2),
    "several blocks": (3, 40, 11, 10),
    "one pixel over a column": (2, 7, 3, 3),
    "fewer channels than a window": (2, 2, 5, 3),
    "one channel": (1, 1, 5, 3),
}


@each_backend
@each_variant(USUAL, whole=len(USUAL))
def test_usual_window(format: torch.memory_format, dtype: torch.dtype, case: Any, backend: Any) -> None:
    assert_parity(*both(size=5, alpha=2.0), (new(*case, dtype=dtype, format=format),), backend)


@each_backend
@each_format
def test_a_window_of_any_size_sees_the_channels_that_there_are(format: torch.memory_format, backend: Any) -> None:
    x = new(1, 4, 3, 3, dtype=torch.float32, format=format)
    for size in (
        2**40,
        2**62,
    ):  # alpha is of the whole window, so that it must grow with it; stock has no memory for one

        def stock(x: torch.Tensor, alpha: float = 2.0) -> torch.Tensor:
            return x / (1.0 + alpha * x.square().sum(1, keepdim=True)) ** 0.75

        fast = partial(FF.local_response_norm, size=size, alpha=2.0 * size)
        assert_same(fast, stock, (x,), backend)


@each_backend
@each_format
def test_a_power_of_zero_changes_nothing(format: torch.memory_format, backend: Any) -> None:
    x = torch.zeros(1, 24, 3, 3, device=DEVICE).to(memory_format=format)  # all scales are zero
    assert_same(*both(size=5, beta=0.0, k=0.0), (x,), backend)
    assert_same(*both(size=3, beta=0.0, k=0.0), (x,), backend)


@each_backend
@each_dtype
def test_vectors_of_an_unaligned_tensor(dtype: torch.dtype, backend: Any) -> None:
    def shift(x: torch.Tensor) -> torch.Tensor:
        return x[1:].view(1, 3, 2, 16).permute(0, 3, 1, 2)

    fast, plain = both(size=5, alpha=2.0)
    assert_parity(lambda x: fast(shift(x)), lambda x: plain(shift(x)), (new(97, dtype=dtype),), backend)


@each_backend
def test_channels_last_3d(backend: Any) -> None:
    x = new(2, 6, 2, 3, 2, dtype=torch.float32).to(memory_format=torch.channels_last_3d)
    assert_parity(*both(size=3, alpha=2.0), (x,), backend)


@each_backend
@each_format
def test_special_values_go_through_as_in_torch(format: torch.memory_format, backend: Any) -> None:
    x = specials(2, 12, 4, 3).to(memory_format=format)
    assert_same(*both(size=3, alpha=1.0), (x,), backend)
    assert_same(*both(size=3, alpha=1.0, k=0.0), (x.nan_to_num(0.0, 0.0, 0.0),), backend)
    x = specials(2, 24, 4, 3).to(memory_format=format)
    assert_same(*both(size=5, alpha=1.0), (x,), backend)
    assert_same(*both(size=5, alpha=1.0, k=0.0), (x.nan_to_num(0.0, 0.0, 0.0),), backend)


@each_backend
@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, ::2],
        lambda x: x[:, :, 1:, ::2],
        lambda x: x.transpose(2, 3),
        lambda x: x[:, :1].expand(-1, 3, -1, -1),
    ],
    ids=["channels skipped", "pixels skipped", "transposed", "expanded"],
)
def test_views(view: Any, backend: Any) -> None:
    x = new(2, 4, 5, 6, dtype=torch.float32)
    fast, plain = both(size=3, alpha=2.0)
    # torch's own strides here follow the view's; the contract is for dense inputs
    assert_parity(lambda x: fast(view(x)).contiguous(), lambda x: plain(view(x)).contiguous(), (x,), backend)


@each_backend
@pytest.mark.parametrize("examples", [8, pytest.param(20, marks=pytest.mark.sweep)])
def test_any_shape(examples: int, backend: Any) -> None:
    @settings(max_examples=examples, deadline=None, derandomize=True)
    @given(data=st.data())
    def check(data: Any) -> None:
        torch.manual_seed(0)  # each example anew, else a failure could not be found again
        # so many pixels that stock's largest error is no matter of chance
        shape = [data.draw(st.integers(*limits), "shape") for limits in ((1, 2), (1, 9), (3, 5), (29, 45))]
        settings = {
            "size": data.draw(st.integers(1, 7), "size"),
            "alpha": data.draw(st.floats(0, 4, width=32), "alpha"),
            "beta": data.draw(st.sampled_from([0.75, 0.5, 1.0, 0.6]), "beta"),
            "k": data.draw(st.floats(0.5, 3, width=32), "k"),
        }
        format = data.draw(st.sampled_from(list(FORMATS.values())), "format")
        assert_parity(*both(**settings), (new(*shape, dtype=torch.float32, format=format),), backend)

    check()


def test_reference_gradient() -> None:
    x = torch.randn(1, 6, 2, 2, dtype=torch.float64, requires_grad=True, device=DEVICE)
    assert torch.autograd.gradcheck(partial(FF.local_response_norm, size=3, alpha=2.0), (x,))
