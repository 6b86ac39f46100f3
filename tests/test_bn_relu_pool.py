"""Batch norm + ReLU + max-pool against stock torch."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from parity import (
    DEVICE,
    assert_parity,
    each_backend,
    each_case,
    each_compiled,
    each_format,
    each_variant,
    new,
    specials,
)
from test_bn_relu import Case, statistics
from torch import Tensor

import fastcnn
import fastcnn.functional as FF

NAMES = {"kernel_size": "pool_size", "stride": "pool_stride", "padding": "pool_padding", "ceil_mode": "pool_ceil_mode"}

CASES: dict[str, tuple[Case, dict[str, Any]]] = {
    "2x2": (Case((3, 5, 6, 8)), {"kernel_size": 2}),
    "3x3 overlapping, running statistics": (
        Case((2, 5, 7, 9), training=False), {"kernel_size": 3, "stride": 2}
    ),
    "padded": (Case((2, 3, 5, 4)), {"kernel_size": (3, 2), "stride": (2, 1), "padding": 1}),
    "partial windows": (Case((2, 3, 5, 7)), {"kernel_size": 2, "ceil_mode": True}),
    "pixels under no window": (Case((2, 4, 8, 7)), {"kernel_size": 2, "stride": 3}),
    "neither weight nor bias": (Case((2, 4, 6, 6), weight=False, bias=False), {"kernel_size": 2}),
    "channels over one block": (Case((2, 70, 4, 4)), {"kernel_size": 2}),
    "several programs": (Case((2, 2, 40, 36)), {"kernel_size": 2}),
    "float32 parameters": (Case((2, 8, 6, 4), parameters=torch.float32), {"kernel_size": 2}),
    "negative weights": (Case((2, 6, 6, 6), scale=-1.0, shift=2.0), {"kernel_size": 3, "stride": 1}),
}  # fmt: skip


def stock(case: Case, pool: dict[str, Any], input: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    normalized = F.batch_norm(input, *statistics(case, input), weight, bias, training=case.training, eps=case.eps)
    return F.max_pool2d(F.relu(normalized), **pool)


def fused(case: Case, pool: dict[str, Any], input: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    settings: dict[str, Any] = {NAMES[key]: value for key, value in pool.items()}
    return FF.batch_norm_relu_max_pool2d(
        input, *statistics(case, input), weight, bias, training=case.training, eps=case.eps, **settings
    )


@each_backend
@each_variant(CASES)
def test_parity(case: Any, dtype: torch.dtype, format: torch.memory_format, backend: Any) -> None:
    assert_parity(partial(fused, *case), partial(stock, *case), case[0].tensors(dtype, format), backend)


@each_compiled
@each_format
@pytest.mark.parametrize("channels", [16, 21])
@each_case({"float32": torch.float32, "bfloat16": torch.bfloat16})
@pytest.mark.parametrize("size", [2, 3])
def test_vectors_and_several_blocks(
    size: int, case: torch.dtype, channels: int, format: torch.memory_format, backend: Any
) -> None:
    norm, pool = Case((3, channels, 24, 32)), {"kernel_size": size, "stride": 2}
    assert_parity(partial(fused, norm, pool), partial(stock, norm, pool), norm.tensors(case, format), backend)


@each_compiled
@pytest.mark.parametrize("training", [True, False], ids=["training", "running statistics"])
def test_large_planes(training: bool, backend: Any) -> None:
    norm, pool = Case((2, 3, 64, 66), training=training), {"kernel_size": 2}
    tensors = norm.tensors(torch.float32, torch.contiguous_format)
    assert_parity(partial(fused, norm, pool), partial(stock, norm, pool), tensors, backend)


@each_backend
@each_case({"training": True, "running statistics": False})
@each_format
def test_special_values(format: torch.memory_format, case: bool, backend: Any) -> None:
    norm, pool = Case((2, 4, 6, 6), training=case), {"kernel_size": 2}
    input = specials(*norm.shape).to(memory_format=format)
    input[:, 0] = torch.randn(2, 6, 6, device=DEVICE)
    results = []
    for name, function in (("torch", stock), (backend[0], fused)):
        leaf = input.clone(memory_format=torch.preserve_format).requires_grad_()
        with fastcnn.use_backend(name):
            output = function(norm, pool, leaf, None, None)
            output.backward(torch.ones_like(output))
        results.append((output, leaf.grad))
    for mine, other in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(mine, other, equal_nan=True)


@each_backend
@each_format
def test_gradient_is_bitwise_repeatable(format: torch.memory_format, backend: Any) -> None:
    norm, pool = Case((4, 6, 20, 18)), {"kernel_size": 3, "stride": 2}
    tensors = [each.requires_grad_() for each in norm.tensors(torch.float32, format) if each is not None]
    with fastcnn.use_backend(backend[0]):
        losses = (fused(norm, pool, *tensors).square().sum() for _ in range(2))
        first, second = (torch.autograd.grad(loss, tensors) for loss in losses)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@each_backend
def test_second_derivative(backend: Any) -> None:
    norm, pool = Case((3, 2, 4, 4)), {"kernel_size": 2}
    results = []
    for name, function in (("torch", stock), (backend[0], fused)):
        torch.manual_seed(1)
        tensors = [
            each.requires_grad_() for each in norm.tensors(torch.float32, torch.channels_last) if each is not None
        ]
        with fastcnn.use_backend(name):
            loss = function(norm, pool, *tensors).pow(3).sum()
            gradients = torch.autograd.grad(loss, tensors, create_graph=True)
            results.append(torch.autograd.grad(sum(g.square().sum() for g in gradients), tensors))
    for mine, other in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4 * other.abs().max().item())


def test_keeps_input_and_codes_alone() -> None:
    norm, pool = Case((2, 4, 6, 6)), {"kernel_size": 2}
    saved: list[Tensor] = []
    tensors = [
        each.requires_grad_() for each in norm.tensors(torch.float32, torch.contiguous_format) if each is not None
    ]
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t)
    with fastcnn.use_backend("triton"), hooks:
        fused(norm, pool, *tensors)
    images = [t for t in saved if t.dim() == 4]
    assert sorted((t.dtype, tuple(t.shape)) for t in images if t is not tensors[0]) == [(torch.uint8, (2, 4, 3, 3))]


@each_backend
def test_empty_batch(backend: Any) -> None:
    norm, pool = Case((0, 3, 4, 4)), {"kernel_size": 2}
    assert_parity(
        partial(fused, norm, pool),
        partial(stock, norm, pool),
        norm.tensors(torch.float32, torch.contiguous_format),
        backend,
    )


def test_explicit_backend_names_what_it_refuses() -> None:
    mean, variance = torch.zeros(3, device=DEVICE), torch.ones(3, device=DEVICE)
    with fastcnn.use_backend("triton"):
        with pytest.raises(RuntimeError, match=r"takes argument 'input' as \(N, C, H, W\)"):
            FF.batch_norm_relu_max_pool2d(new(2, 3, 4, dtype=torch.float32), mean, variance, pool_size=2)
        with pytest.raises(RuntimeError, match="'pool_size'"):
            FF.batch_norm_relu_max_pool2d(new(1, 3, 16, 16, dtype=torch.float32), mean, variance, pool_size=16)
        x = new(1, 3, 6, 6, dtype=torch.float32)
        with pytest.raises(RuntimeError, match="'pool_padding'"):
            FF.batch_norm_relu_max_pool2d(x, mean, variance, pool_size=2, pool_padding=2)


@each_backend
@each_format
def test_values_that_round_to_equals_tie(format: torch.memory_format, backend: Any) -> None:
    x = torch.tensor([1.0, 1.5, 1.25, 1.75], device=DEVICE).view(1, 1, 2, 2).expand(1, 8, 2, 2).bfloat16()
    mean, variance, weight = (torch.full((8,), value, device=DEVICE) for value in (0.0, 1.0, 0.01))
    leaf = x.contiguous(memory_format=format).requires_grad_()
    with fastcnn.use_backend(backend[0]):  # all come to 100 in bfloat16
        output = FF.batch_norm_relu_max_pool2d(leaf, mean, variance, weight, weight * 1e4, pool_size=2)
        output.sum().backward()
    assert leaf.grad is not None
    assert (leaf.grad != 0).flatten(2).nonzero()[:, 2].eq(0).all()
