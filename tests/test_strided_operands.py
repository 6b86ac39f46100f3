"""Operands that are views with steps, or one number expanded: every operator gives what it gives their copies."""

from typing import Any

import pytest
import torch
from parity import COMPILED, DEVICE, last_place
from test_compile import ONLY_TRITON, OPERATORS, calls, op
from torch import Tensor

import fastcnn
import fastcnn.functional as FF

BACKENDS = ("triton", *(name for name, _ in COMPILED))
ALGORITHMS = {
    "triton": ("epilogue", "implicit_gemm", "packed", "tma", *(("warp_specialized",) if DEVICE == "cuda" else ())),
    "cuda": ("epilogue", "implicit_gemm", "direct"),
}


def stepping(tensor: Tensor) -> Tensor:
    """Return equal values in the same layout, each followed by poison."""
    buffer = tensor.new_full((2 * tensor.numel(),), float("nan") if tensor.is_floating_point() else 7)
    return buffer.as_strided(tensor.shape, [2 * stride for stride in tensor.stride()]).copy_(tensor)


def assert_same(results: Any, others: Any) -> None:
    leaves, other_leaves = (torch.utils._pytree.tree_leaves(each) for each in (results, others))
    assert leaves
    for one, other in zip(leaves, other_leaves, strict=True):
        if not torch.equal(one, other):  # torch's own matrix products sum in an order that depends on strides
            assert (one - other).abs().max() <= 4 * last_place(other, other.dtype)


def assert_takes_views(operator: Any, arguments: tuple[Any, ...]) -> None:
    """Assert that each tensor may be a view with steps, and each with one axis one number expanded."""
    plain = operator(*arguments)
    for i, each in enumerate(arguments):
        if isinstance(each, Tensor):
            assert_same(operator(*arguments[:i], stepping(each), *arguments[i + 1 :]), plain)
        if isinstance(each, Tensor) and each.dim() == 1 and len(each) > 1:
            one = each[:1].expand(len(each))
            copied = operator(*arguments[:i], one.contiguous(), *arguments[i + 1 :])
            assert_same(operator(*arguments[:i], one, *arguments[i + 1 :]), copied)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("name", "backend"),
    [(name, backend) for name in OPERATORS for backend in BACKENDS] + [(name, "triton") for name in ONLY_TRITON],
)
def test_operator(name: str, backend: str, layout: str) -> None:
    assert_takes_views(op(name, backend), calls(layout)[name])


@pytest.mark.parametrize(
    ("backend", "algorithm"), [(backend, each) for backend in BACKENDS for each in ALGORITHMS.get(backend, ())]
)
@pytest.mark.parametrize("name", ["conv_relu", "conv_relu_pool_codes"])
def test_convolution_by_every_algorithm(name: str, backend: str, algorithm: str) -> None:
    channels, outputs, dtype = 3, 8, torch.float32
    if algorithm in ("tma", "warp_specialized"):
        channels, outputs, dtype = 8, 16, torch.bfloat16
    tensors = [
        torch.randn(shape).to(DEVICE, dtype) for shape in ((2, channels, 6, 6), (outputs, channels, 3, 3), (outputs,))
    ]
    window = ([2, 2, 2, 2, 0, 0, 1, 1, 0],) if "pool" in name else ()
    assert_takes_views(op(name, backend), (*tensors, [1, 1, 1, 1, 1, 1, 1], algorithm, *window))


@pytest.mark.parametrize("name", ["normalize_conv_relu", "conv_relu"])
def test_space_to_depth(name: str) -> None:
    x, w, bias, *norm = (torch.rand(shape, device=DEVICE) + 0.5 for shape in ((1, 3, 7, 7), (4, 3, 3, 3), 4, 3, 3))
    constants = norm if name.startswith("normalize") else ()
    settings = [2, 2, 1, 1, 1, 1, 1], "space_to_depth"
    assert_takes_views(op(name, "triton"), (x, *constants, w, bias, *settings))


FUNCTIONS: dict[str, tuple[Any, list[tuple[int, ...]], tuple[int, ...]]] = {  # shapes, and which of them are operands
    "conv": (lambda x, w, b: FF.conv2d_relu(x, w, b, padding=1), [(2, 3, 6, 6), (8, 3, 3, 3), (8,)], (2,)),
    "pool": (lambda x, w, b: FF.conv2d_relu_max_pool2d(x, w, b, pool_size=2), [(2, 3, 6, 6), (8, 3, 3, 3), (8,)], (2,)),
    "linear": (FF.linear_relu, [(5, 6), (8, 6), (8,)], (2,)),
    "norm": (FF.batch_norm_relu, [(2, 8, 3, 3), (8,), (8,), (8,), (8,)], (1, 2, 3, 4)),
    "training": (lambda *args: FF.batch_norm_relu(*args, True), [(2, 8, 3, 3), (8,), (8,), (8,), (8,)], (1, 2, 3, 4)),
    "norm, pool": (
        lambda *args: FF.batch_norm_relu_max_pool2d(*args, pool_size=2),
        [(2, 8, 4, 4), (8,), (8,), (8,), (8,)],
        (1, 2, 3, 4),
    ),
    "normalize": (FF.normalize, [(2, 3, 4, 4), (3,), (3,)], (1, 2)),
}


@pytest.mark.parametrize("backend", ["torch", *BACKENDS])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_function(name: str, backend: str) -> None:
    function, shapes, operands = FUNCTIONS[name]
    with fastcnn.use_backend("torch" if name == "normalize" and backend == "cuda" else backend):
        for i in operands:
            plain, steps = ([torch.rand(shape, device=DEVICE) + 0.5 for shape in shapes] for _ in range(2))
            for one, other in zip(plain, steps, strict=True):
                other.copy_(one)
            steps[i] = stepping(steps[i])
            torch.testing.assert_close(function(*steps), function(*plain))
            torch.testing.assert_close(steps[i], plain[i])  # running statistics, which are updated in place
