"""Max-pool against stock torch: values, indices and gradients."""

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
    each_case,
    each_format,
    each_variant,
    new,
    specials,
)

import fastcnn
import fastcnn.functional as FF

CASES: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "2x2 over even sizes": ((2, 5, 6, 8), {"kernel_size": 2}),
    "3x3/2 overlapping": ((2, 3, 9, 7), {"kernel_size": 3, "stride": 2}),
    "padding": ((1, 6, 7, 5), {"kernel_size": 3, "stride": 2, "padding": 1}),
    "ceil_mode": ((2, 3, 8, 6), {"kernel_size": 3, "stride": 2, "ceil_mode": True}),
    "ceil_mode drops a window in the padding": (
        (1, 2, 5, 5),
        {"kernel_size": 2, "stride": 3, "padding": 1, "ceil_mode": True},
    ),
    "dilation": ((1, 4, 9, 8), {"kernel_size": 2, "stride": 1, "dilation": (2, 3)}),
    "everything, not square": (
        (2, 3, 10, 9),
        {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 1), "dilation": (2, 3), "ceil_mode": True},
    ),
    "stride over the window": ((1, 3, 9, 9), {"kernel_size": 2, "stride": 4}),
    "stride over a window's width": ((2, 3, 5, 8), {"kernel_size": (2, 1), "stride": (1, 2)}),
    "stride over a window's height": ((2, 3, 8, 5), {"kernel_size": (1, 2), "stride": (2, 1), "padding": (0, 1)}),
    "one pixel of four": ((2, 3, 6, 8), {"kernel_size": 1, "stride": 2}),
    "stride over the image": ((2, 3, 9, 8), {"kernel_size": 2, "stride": (2, 2**29), "ceil_mode": True}),
    "stride to the last column": ((1, 3, 7, 9), {"kernel_size": 3, "stride": (1, 9), "padding": 1, "ceil_mode": True}),
    "dilated over the image": (
        (1, 3, 9, 8),
        {"kernel_size": (2, 3), "stride": 2**29, "dilation": (2**28, 2**27), "ceil_mode": True},
    ),
    "whole image": ((3, 2, 4, 5), {"kernel_size": (4, 5)}),
    "one pixel": ((2, 3, 1, 1), {"kernel_size": 1}),
    "one channel": ((2, 1, 6, 6), {"kernel_size": 2}),
    "254 places": ((1, 1, 3, 254), {"kernel_size": (2, 127)}),
    "channels over one block": ((1, 70, 4, 3), {"kernel_size": 2}),
    "empty batch": ((0, 3, 6, 6), {"kernel_size": 2}),
    "whole vectors": ((2, 16, 6, 7), {"kernel_size": 2}),
    "whole vectors, 3x3/2": ((1, 24, 9, 8), {"kernel_size": 3, "stride": 2, "padding": 1, "ceil_mode": True}),
    "whole vectors, any window": ((1, 8, 7, 6), {"kernel_size": (2, 3), "stride": 1, "dilation": (2, 1)}),
    "whole rows of pairs": ((2, 3, 5, 16), {"kernel_size": 2}),
    "more channels than threads": ((1, 2064, 2, 2), {"kernel_size": 2}),
    "whole pairs of a large plane": ((1, 2, 64, 64), {"kernel_size": 2}),
    "strips of rows": ((1, 2, 71, 9), {"kernel_size": 3, "stride": 2, "padding": 1}),
    "more strips than a block": ((1, 2, 9, 521), {"kernel_size": 3, "stride": 2}),
    "padding in long rows": ((1, 2, 5, 13), {"kernel_size": 3, "stride": 2, "padding": 1}),
    "ceil_mode in long rows": ((1, 2, 5, 14), {"kernel_size": 3, "stride": 2, "ceil_mode": True}),
    "larger planes than blocks": ((1, 2, 36, 40), {"kernel_size": 2, "stride": 2}),
}


def both(**settings: Any) -> tuple[Any, Any]:
    """Return fastcnn's function and torch's with these settings."""
    return partial(FF.max_pool2d, **settings), partial(F.max_pool2d, **settings)


@each_backend
@each_variant(CASES)
def test_parity(case: Any, dtype: torch.dtype, format: torch.memory_format, backend: Any) -> None:
    shape, settings = case
    assert_parity(*both(**settings), (new(*shape, dtype=dtype, format=format),), backend)


@each_backend
@each_format
@each_case(CASES)
def test_indices_are_torchs(case: Any, format: torch.memory_format, backend: Any) -> None:
    shape, settings = case
    x = torch.randint(0, 4, shape, device=DEVICE).float().to(memory_format=format)  # many ties
    with fastcnn.use_backend(backend[0]):
        output, indices = FF.max_pool2d(x, return_indices=True, **settings)
    expected = F.max_pool2d(x, return_indices=True, **settings)
    assert indices.dtype == torch.int64
    torch.testing.assert_close((output, indices), tuple(expected), rtol=0, atol=0)


@each_backend
@each_format
def test_a_window_between_pixels_has_an_index_in_the_plane(format: torch.memory_format, backend: Any) -> None:
    # In the padding on both sides and on no pixel. Stock itself must not run this: it writes outside its gradient.
    x = torch.ones(2, 3, 3, 1, device=DEVICE).to(memory_format=format).requires_grad_()
    with fastcnn.use_backend(backend[0]):
        output, indices = FF.max_pool2d(x, (3, 2), padding=(0, 1), dilation=(1, 2), return_indices=True)
    assert (output == float("-inf")).all()
    assert (indices == 0).all()
    (gradient,) = torch.autograd.grad(output.sum(), x)
    assert (gradient == 0).all()


@each_backend
@each_format
@pytest.mark.parametrize("width", [4, 17], ids=["short rows", "long rows"])
def test_special_values_go_through_as_in_torch(width: int, format: torch.memory_format, backend: Any) -> None:
    x = specials(2, 3, 9, 2 * width).to(memory_format=format)
    assert_same(*both(kernel_size=3, stride=2, padding=1), (x,), backend)
    everything_low = torch.full((1, 2, 4, width), float("-inf"), device=DEVICE)
    assert_same(*both(kernel_size=2), (everything_low,), backend)
    assert_same(*both(kernel_size=3, padding=1), (everything_low.to(memory_format=format),), backend)
    assert_same(*both(kernel_size=(3, 2), padding=1), (everything_low.to(memory_format=format),), backend)


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
@each_format
def test_views(view: Any, format: torch.memory_format, backend: Any) -> None:
    x = new(2, 4, 8, 9, dtype=torch.float32, format=format)
    assert_parity(*(lambda x, f=f: f(view(x)) for f in both(kernel_size=3, stride=2)), (x,), backend)


@each_backend
@each_format
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [2, 3], ids=str)
def test_ties_and_specials_in_whole_vectors(
    size: int, dtype: torch.dtype, format: torch.memory_format, backend: Any
) -> None:
    x = specials(2, 16, 8, 16, dtype=dtype).to(memory_format=format)
    assert_same(*both(kernel_size=size, stride=2), (x,), backend)


@each_backend
@each_format
@pytest.mark.parametrize("size", [2, 3], ids=str)
def test_memory_that_is_not_aligned(size: int, format: torch.memory_format, backend: Any) -> None:
    x = new(2, 16, 6, 16, dtype=torch.bfloat16, format=format)
    shifted = torch.empty(x.numel() + 1, dtype=x.dtype, device=DEVICE)[1:].as_strided(x.shape, x.stride()).copy_(x)
    assert_same(*both(kernel_size=size, stride=2), (shifted,), backend)


@each_backend
@each_format
@pytest.mark.parametrize(("stride", "padding"), [(1, 0), pytest.param(2, 1, marks=pytest.mark.sweep)])
def test_unpooling_many_images(stride: int, padding: int, format: torch.memory_format, backend: Any) -> None:
    x = new(70, 8, 4, 6, dtype=torch.float32, format=format)  # more places than one pass of a block
    assert_same(*both(kernel_size=3, stride=stride, padding=padding), (x,), backend)


@each_backend
def test_unbatched(backend: Any) -> None:
    assert_parity(*both(kernel_size=2), (new(3, 6, 6, dtype=torch.float32),), backend)


@each_backend
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_any_window(data: Any, backend: Any) -> None:
    size = data.draw(st.tuples(st.integers(1, 4), st.integers(1, 4)), "kernel_size")
    stride = data.draw(st.tuples(st.integers(1, 4), st.integers(1, 4)), "stride")
    dilation = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 3)), "dilation")
    spans = [d * (k - 1) + 1 for d, k in zip(dilation, size)]
    padding = tuple(data.draw(st.integers(0, k // 2), "padding") for k in size)  # torch allows no more everywhere
    shape = [data.draw(st.integers(1, 3)), data.draw(st.integers(1, 5))]
    shape += [data.draw(st.integers(span, span + 6), "pixels") for span in spans]
    ceil_mode = data.draw(st.booleans(), "ceil_mode")
    format = data.draw(st.sampled_from(list(FORMATS.values())), "format")
    x = torch.randint(-3, 4, shape, device=DEVICE).float().to(memory_format=format)
    settings = {"kernel_size": size, "stride": stride, "padding": padding, "dilation": dilation, "ceil_mode": ceil_mode}
    assert_same(*both(**settings), (x,), backend)


def test_reference_gradient() -> None:
    x = torch.randn(1, 2, 5, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(partial(FF.max_pool2d, kernel_size=3, stride=2, padding=1), (x,))
