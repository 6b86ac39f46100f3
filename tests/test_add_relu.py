"""Addition + ReLU against stock torch."""

from typing import Any

import pytest
import torch
from parity import (
    DEVICE,
    assert_parity,
    assert_same,
    each_backend,
    each_case,
    each_compiled,
    each_variant,
    new,
    specials,
)
from torch import Tensor

import fastcnn
import fastcnn.functional as FF

CASES: dict[str, tuple[int, ...]] = {
    "odd image": (2, 5, 7, 5),
    "unbatched": (3, 4, 5),
    "more than one block": (2, 9, 11, 13),
    "vector": (17,),
    "one number": (),
    "empty": (0, 3, 4, 4),
}


def stock(input: Tensor, other: Tensor) -> Tensor:
    return torch.relu(input + other)


@each_backend
@each_variant(CASES)
def test_parity(case: Any, dtype: torch.dtype, format: torch.memory_format, backend: Any) -> None:
    tensors = (new(*case, dtype=dtype, format=format), new(*case, dtype=dtype, format=format))
    assert_parity(FF.add_relu, stock, tensors, backend)


LAYOUTS = {
    "the other channels_last": (lambda x: x, lambda x: x.to(memory_format=torch.channels_last)),
    "the first channels_last": (lambda x: x.to(memory_format=torch.channels_last), lambda x: x),
    "transposed": (lambda x: x.transpose(2, 3), lambda x: x.transpose(2, 3)),
    "expanded": (lambda x: x, lambda x: x[:1].expand(x.shape)),
    "with gaps": (lambda x: x[:, 1:, :, ::2], lambda x: x[:, :-1, :, ::2]),
}


@each_backend
@each_case(LAYOUTS)
def test_layouts(case: Any, backend: Any) -> None:
    first, second = case
    tensors = (new(2, 6, 5, 7, dtype=torch.float32), new(2, 6, 5, 7, dtype=torch.float32))
    assert_parity(
        lambda a, b: FF.add_relu(first(a), second(b)), lambda a, b: stock(first(a), second(b)), tensors, backend
    )


@each_backend
def test_special_values(backend: Any) -> None:
    assert_same(FF.add_relu, stock, (specials(2, 4, 5, 6), specials(2, 4, 5, 6)), backend)


@each_backend
def test_sum_of_a_tensor_and_itself(backend: Any) -> None:
    assert_parity(lambda x: FF.add_relu(x, x), lambda x: stock(x, x), (new(3, 5, dtype=torch.float32),), backend)


@each_backend
def test_one_gradient_alone(backend: Any) -> None:
    other = new(2, 3, 4, 4, dtype=torch.float32)
    case = (new(2, 3, 4, 4, dtype=torch.float32),)
    assert_parity(lambda x: FF.add_relu(other.to(x), x), lambda x: stock(other.to(x), x), case, backend)


@each_compiled
@each_case({"float32": torch.float32, "bfloat16": torch.bfloat16})
@pytest.mark.parametrize("start", [0, 1])
def test_vectors_and_single_elements(start: int, case: torch.dtype, backend: Any) -> None:
    def part(x: Tensor) -> Tensor:  # without a start that is aligned to 16 bytes
        return x[start:]

    tensors = (new(70001, dtype=case), new(70001, dtype=case))
    assert_parity(lambda a, b: FF.add_relu(part(a), part(b)), lambda a, b: stock(part(a), part(b)), tensors, backend)


BROADCAST = {
    "a bias": ((2, 3, 4, 4), (3, 1, 1)),
    "a number": ((2, 3), ()),
    "both": ((2, 1, 4), (3, 1)),
}


@pytest.mark.parametrize("shapes", BROADCAST.values(), ids=BROADCAST)
def test_broadcasting_and_promotion_run_stock_under_auto(shapes: Any) -> None:
    a, b = (new(*shape, dtype=torch.float32) for shape in shapes)
    for other in (b, b.double(), b.round().long()):
        assert torch.equal(FF.add_relu(a, other), stock(a, other))
    with fastcnn.use_backend("triton"), pytest.raises(RuntimeError, match=r"add_relu: backend 'triton' .*'other'"):
        FF.add_relu(a, b)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_mistakes(backend: str) -> None:
    x = torch.ones(2, 3, device=DEVICE)
    with fastcnn.use_backend(backend):
        with pytest.raises(RuntimeError, match="'other': expected a shape that broadcasts"):
            FF.add_relu(x, torch.ones(2, 4, device=DEVICE))
        with pytest.raises(TypeError, match="'other': expected a Tensor"):
            FF.add_relu(x, "one")  # type: ignore[arg-type]


@each_backend
def test_under_vmap(backend: Any) -> None:
    a, b = new(4, 3, 5, dtype=torch.float32), new(3, 4, 5, dtype=torch.float32)
    expected = torch.vmap(stock, (0, 1))(a, b), torch.vmap(stock, (0, None))(a, b[:, 0])
    with fastcnn.use_backend(backend[0]):
        actual = torch.vmap(FF.add_relu, (0, 1))(a, b), torch.vmap(FF.add_relu, (0, None))(a, b[:, 0])
    for mine, other in zip(actual, expected, strict=True):
        assert torch.equal(mine, other)
