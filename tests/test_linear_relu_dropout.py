"""Linear + ReLU + dropout: the mask is fair and repeatable, and all else is stock torch's under that mask."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from parity import DEVICE, assert_parity, each_case, each_dtype, new
from tables import operators
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastcnn
import fastcnn.functional as FF
from fastcnn.triton import tiles

KERNEL = "fastcnn.linear_relu_dropout.triton"
# input, weight, p
CASES: dict[str, tuple[tuple[int, ...], tuple[int, int], float]] = {
    "rows": ((6, 5), (7, 5), 0.5),
    "no batch": ((5,), (3, 5), 0.5),
    "several axes": ((2, 3, 5), (7, 5), 0.2),
    "more than a block": ((40, 4), (33, 4), 0.9),
    "empty batch": ((0, 5), (7, 5), 0.5),
}


def ones(rows: int, features: int, **settings: Any) -> torch.Tensor:
    """Return dropout's output for activations of one, by the kernel."""
    x, weight = torch.ones(rows, 1, device=DEVICE), torch.ones(features, 1, device=DEVICE)
    with fastcnn.use_backend("triton"), torch.no_grad():
        return FF.linear_relu_dropout(x, weight, **settings)


@each_dtype
@each_case(CASES)
def test_parity_under_the_same_mask(case: Any, dtype: torch.dtype) -> None:
    input, weight, p = case
    tensors = (new(*input, dtype=dtype), new(*weight, dtype=dtype), new(weight[0], dtype=dtype))
    rows = tensors[0].numel() // input[-1]
    torch.manual_seed(1)
    kept = (ones(rows, weight[0], p=p) != 0).view(*input[:-1], weight[0])

    def fast(*tensors: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(1)
        return FF.linear_relu_dropout(*tensors, p)

    def stock(*tensors: torch.Tensor) -> torch.Tensor:
        return F.relu(F.linear(*tensors)) * kept / (1 - p)

    assert_parity(fast, stock, tensors, ("triton", None))


def test_without_bias_and_with_one_bias_for_all() -> None:
    x, weight = new(4, 5, dtype=torch.float32), new(3, 5, dtype=torch.float32)
    with fastcnn.use_backend("triton"):
        for bias in (None, torch.ones(1, device=DEVICE)):
            ours = FF.linear_relu_dropout(x, weight, bias)
            full = 2 * F.relu(F.linear(x, weight, bias))
            torch.testing.assert_close(ours, torch.where(ours == 0, 0, full))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.8])
def test_units_are_dropped_at_the_rate_asked_for(p: float) -> None:
    count = 512 * 256
    y = ones(512, 256, p=p)
    dropped = (y == 0).double()
    # five standard deviations of a fair coin: one run in two million would fail, and the seed is fixed
    assert abs(dropped.mean().item() - p) < 5 * (p * (1 - p) / count) ** 0.5
    torch.testing.assert_close(y[y != 0].unique(), torch.tensor([1 / (1 - p)], device=DEVICE))


def test_units_rows_and_calls_are_independent() -> None:
    first, second = (ones(512, 256).ne(0).double() * 2 - 1 for _ in range(2))
    bound = 5 / first.numel() ** 0.5
    for other in (second, first.roll(1, 0), first.roll(1, 1), first.roll(7, 1)):
        assert abs((first * other).mean().item()) < bound
    assert first.mean(0).abs().max() < 5 / 512**0.5  # no column prefers a side
    assert first.mean(1).abs().max() < 5 / 256**0.5


def test_repeats_under_a_seed_and_differs_from_call_to_call() -> None:
    torch.manual_seed(3)
    first, second = ones(8, 64), ones(8, 64)
    torch.manual_seed(3)
    assert ones(8, 64).equal(first)
    assert not first.equal(second)


def test_the_seed_is_drawn_on_the_device() -> None:
    """A CUDA graph replays the draw, and so drops anew: the seed is the result of an operator, not a number."""
    x, weight = torch.ones(2, 3, device=DEVICE), torch.ones(4, 3, device=DEVICE)
    with fastcnn.use_backend("triton"), torch.no_grad():
        _, _, _, seed, p = operators(lambda: FF.linear_relu_dropout(x, weight, p=0.25))[KERNEL]
    assert isinstance(seed, torch.Tensor)
    assert (seed.device, seed.dtype, p) == (x.device, torch.int64, 0.25)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_graph_drops_anew_at_each_replay() -> None:
    ones(8, 64)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ones(8, 64)
    graph.replay()
    first = y.clone()
    graph.replay()
    assert not first.equal(y)


def test_checkpointing_repeats_the_mask() -> None:
    x, weight = new(6, 5, dtype=torch.float32), new(32, 5, dtype=torch.float32).requires_grad_()
    with fastcnn.use_backend("triton"):
        gradients = []
        for run in (FF.linear_relu_dropout, lambda *t: checkpoint(FF.linear_relu_dropout, *t, use_reentrant=False)):
            torch.manual_seed(2)
            gradients += torch.autograd.grad(run(x, weight).sum(), weight)
    torch.testing.assert_close(*gradients)


def test_output_may_be_changed_in_place() -> None:
    x, weight, bias = (new(*shape, dtype=torch.float32).requires_grad_() for shape in ((4, 5), (16, 5), (16,)))
    with fastcnn.use_backend("triton"):
        torch.manual_seed(2)
        plain = FF.linear_relu_dropout(x, weight, bias)
        expected = torch.autograd.grad((plain * 3 + 1).square().sum(), (x, weight, bias))
        torch.manual_seed(2)
        changed = FF.linear_relu_dropout(x, weight, bias)
        changed.mul_(3).add_(1)
    for mine, theirs in zip(torch.autograd.grad(changed.square().sum(), (x, weight, bias)), expected, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_penalty_gives_gradients_of_zero_as_stock_does() -> None:
    x, weight, bias = (new(*shape, dtype=torch.float32).requires_grad_() for shape in ((4, 5), (16, 5), (16,)))
    with fastcnn.use_backend("triton"):
        y = FF.linear_relu_dropout(x, weight, bias)
        (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        slope.square().sum().backward()
    assert weight.grad is not None
    for each in (x, bias):
        assert each.grad is not None
        assert not each.grad.any()


def test_gradient_is_the_outputs_mask_and_nothing_else_is_kept() -> None:
    x, weight = new(6, 5, dtype=torch.float32), new(32, 5, dtype=torch.float32)
    bias = torch.zeros(32, device=DEVICE, requires_grad=True)
    kept: list[tuple[Any, ...]] = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append((*t.shape, t.dtype)) or t, lambda t: t)
    with fastcnn.use_backend("triton"), hooks:
        y = FF.linear_relu_dropout(x, weight, bias, 0.2)
    single = torch.float32
    assert sorted(kept, key=str) == [(6, 0, single), (6, 32, torch.bool)]
    (grad,) = torch.autograd.grad(y.sum(), bias)
    torch.testing.assert_close(grad, (y > 0).sum(0) / 0.8)


def test_nan_goes_through_dropped_or_not() -> None:
    x = torch.tensor([[float("nan")], [1.0], [-1.0], [float("inf")]], device=DEVICE)
    with fastcnn.use_backend("triton"):
        y = FF.linear_relu_dropout(x, torch.ones(64, 1, device=DEVICE))
    assert y[0].isnan().all()  # as in torch, where it is multiplied by the mask
    assert set(y[1].unique().tolist()) == {0.0, 2.0}
    assert y[2].eq(0).all()
    assert (y[3].isnan() | y[3].isinf()).all()  # infinity times zero


@pytest.mark.parametrize("backend", ["auto", "torch", "cpu", "triton"])
@pytest.mark.parametrize(("p", "training"), [(0.0, True), (1.0, True), (0.5, False)])
def test_nothing_random_is_stocks(p: float, training: bool, backend: str) -> None:
    x, weight, bias = (new(*shape, dtype=torch.float32).requires_grad_() for shape in ((4, 5), (3, 5), (3,)))
    if not fastcnn.backends()[backend].available or (backend == "cpu" and DEVICE == "cuda"):
        pytest.skip(f"needs backend {backend}")
    state = torch.get_rng_state()
    expected = F.dropout(F.relu(F.linear(x, weight, bias)), p, training)
    torch.set_rng_state(state)
    with fastcnn.use_backend(backend):
        ours = FF.linear_relu_dropout(x, weight, bias, p, training)
    torch.testing.assert_close(ours, expected)
    for mine, theirs in zip(*(torch.autograd.grad(y.sum(), (x, weight, bias)) for y in (ours, expected)), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("backend", ["auto", "torch", "cpu"])
def test_other_backends_drop_what_stock_drops(backend: str) -> None:
    if not fastcnn.backends()[backend].available or (backend == "cpu" and DEVICE == "cuda"):
        pytest.skip(f"needs backend {backend}")
    layers = [nn.Linear(5, 64), nn.ReLU(inplace=True), nn.Dropout(0.3), nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.6)]
    model, x = nn.Sequential(*layers).to(DEVICE), new(6, 5, dtype=torch.float32)
    torch.manual_seed(5)
    expected = model(x)
    torch.manual_seed(5)
    with fastcnn.use_backend(backend):
        torch.testing.assert_close(fastcnn.fuse(model)(x), expected)


def test_stages_of_classifiers() -> None:
    vgg = [nn.Linear(5, 8), nn.ReLU(inplace=True), nn.Dropout(0.25)]
    alexnet = [nn.Dropout(0.25), nn.Linear(5, 8), nn.ReLU(inplace=True)]
    x = new(3, 5, dtype=torch.float32)
    with fastcnn.use_backend("triton"), torch.no_grad():
        model = fastcnn.nn.Sequential(*vgg).to(DEVICE)
        assert operators(lambda: model(x))[KERNEL][-1] == 0.25
        assert KERNEL not in operators(lambda: model.eval()(x))
        assert KERNEL not in operators(lambda: fastcnn.nn.Sequential(*alexnet).to(DEVICE)(x))
        model = fastcnn.nn.Sequential(vgg[0], vgg[1], nn.Dropout(0.5, inplace=True)).to(DEVICE)
        assert KERNEL not in operators(lambda: model(x))  # torch drops by other numbers there
        assert model(x).shape == (3, 8)


def test_second_derivatives_and_compile() -> None:
    x, weight = new(4, 5, dtype=torch.float32).requires_grad_(), new(16, 5, dtype=torch.float32).requires_grad_()
    with fastcnn.use_backend("triton"):
        y = FF.linear_relu_dropout(x, weight, p=0.25)
        (slope,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        (ours,) = torch.autograd.grad(slope.square().sum(), weight)
        mask = (y != 0).detach() / 0.75
        (slope,) = torch.autograd.grad((F.relu(x @ weight.t()) * mask).square().sum(), x, create_graph=True)
        (expected,) = torch.autograd.grad(slope.square().sum(), weight)
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-3)
        run = torch.compile(lambda x: FF.linear_relu_dropout(x, weight), backend="aot_eager", fullgraph=True)
        first, second = run(x), run(x)
    assert not first.equal(second)
    full = 2 * F.relu(x @ weight.t())
    torch.testing.assert_close(first, torch.where(first == 0, 0, full), rtol=1e-4, atol=1e-4)


def test_vmap_obeys_torchs_rules_for_random_numbers() -> None:
    x, weight = new(3, 4, 5, dtype=torch.float32), new(16, 5, dtype=torch.float32)
    with fastcnn.use_backend("triton"):
        for randomness in ("same", "different"):
            y = torch.func.vmap(lambda x: FF.linear_relu_dropout(x, weight), randomness=randomness)(torch.ones_like(x))
            assert y[0].equal(y[1]) == (randomness == "same")
        with pytest.raises(RuntimeError, match="randomness"):
            torch.func.vmap(lambda x: FF.linear_relu_dropout(x, weight))(x)


@pytest.mark.parametrize(
    ("p", "kind", "message"),
    [
        (1.5, ValueError, "'p': expected a probability from 0 to 1, got 1.5"),
        (-0.1, ValueError, "'p': expected a probability from 0 to 1"),
        ("half", TypeError, "'p': expected a probability, got 'half'"),
    ],
)
def test_mistakes(p: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        FF.linear_relu_dropout(torch.ones(2, 3), torch.ones(4, 3), p=p)


def test_mistaken_shapes_name_the_function() -> None:
    x, weight = torch.ones(2, 3, device=DEVICE), torch.ones(4, 5, device=DEVICE)
    with fastcnn.use_backend("triton"), pytest.raises(RuntimeError, match="linear_relu_dropout: argument 'input'"):
        FF.linear_relu_dropout(x, weight)


def test_offsets_of_64_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(4)
    narrow = ones(9, 130)
    monkeypatch.setattr(tiles, "WIDE_FROM", 1)
    torch.manual_seed(4)
    assert ones(9, 130).equal(narrow)


def test_opcheck() -> None:
    x, weight, bias = (new(*s, dtype=torch.float32).requires_grad_() for s in ((4, 5), (6, 5), (6,)))
    seed = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    tensors = [t.detach() for t in (x, weight, bias)]
    torch.library.opcheck(torch.ops.fastcnn.linear_relu_dropout.triton, (*tensors, seed, 0.5))
    y = new(4, 6, dtype=torch.float32)
    torch.library.opcheck(torch.ops.fastcnn.linear_relu_dropout_backward.triton, (y, y, 0.5, True))
