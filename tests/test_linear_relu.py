"""Linear + ReLU against stock torch."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from parity import DEVICE, assert_parity, assert_same, each_backend, each_case, each_compiled, each_dtype, new, specials

import fastcnn.functional as FF

# input, weight
CASES: dict[str, tuple[tuple[int, ...], tuple[int, int]]] = {
    "rows": ((6, 5), (7, 5)),
    "one row": ((1, 9), (4, 9)),
    "no batch": ((5,), (3, 5)),
    "several axes": ((2, 3, 5), (7, 5)),
    "features over one block": ((3, 5), (130, 5)),
    "many rows": ((150, 4), (3, 4)),
    "empty batch": ((0, 5), (7, 5)),
    "whole vectors": ((5, 3), (24, 3)),
    "more features than threads": ((3, 2), (2064, 2)),
}


def stock(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return F.relu(F.linear(input, weight, bias))


@each_backend
@each_dtype
@each_case(CASES)
def test_parity(case: Any, dtype: torch.dtype, backend: Any) -> None:
    input, weight = case
    tensors = (new(*input, dtype=dtype), new(*weight, dtype=dtype), new(weight[0], dtype=dtype))
    assert_parity(FF.linear_relu, stock, tensors, backend)


@each_backend
def test_without_bias(backend: Any) -> None:
    assert_parity(
        FF.linear_relu, stock, (new(4, 5, dtype=torch.float32), new(3, 5, dtype=torch.float32), None), backend
    )


@each_backend
def test_special_values_go_through_as_in_torch(backend: Any) -> None:
    tensors = (specials(30, 1), torch.ones(3, 1, device=DEVICE), torch.zeros(3, device=DEVICE))
    assert_same(FF.linear_relu, stock, tensors, backend)


@each_backend
def test_views(backend: Any) -> None:
    x, w = new(6, 10, dtype=torch.float32), new(5, 3, dtype=torch.float32)
    assert_parity(
        lambda x, w: FF.linear_relu(x[::2, ::2], w.t()), lambda x, w: stock(x[::2, ::2], w.t()), (x, w), backend
    )


def test_reference_gradient() -> None:
    x, w, b = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((3, 4), (5, 4), (5,)))
    assert torch.autograd.gradcheck(FF.linear_relu, (x, w, b))


@each_compiled
def test_backward_names_itself_where_shapes_differ(backend: Any) -> None:
    operator = getattr(torch.ops.fastcnn.linear_relu_backward, backend[0])
    with pytest.raises(RuntimeError, match="linear_relu_backward: shapes differ"):
        operator(torch.ones(2, 3, device=DEVICE), torch.ones(2, 4, device=DEVICE), False)
