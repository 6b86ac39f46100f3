"""fastcnn.optim.SGD against torch.optim.SGD on float32 weights that round as the shadows do."""

import copy
from typing import Any

import pytest
import torch
from parity import DEVICE, DTYPES, each_case

import fastcnn
from fastcnn.triton import sgd

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {"lr": 0.1},
    "AlexNet's": {"lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4},
    "nesterov": {"lr": 0.1, "momentum": 0.8, "nesterov": True},
    "dampening, maximize": {"lr": 0.1, "momentum": 0.7, "dampening": 0.3, "maximize": True},
    "weight decay alone": {"lr": 0.1, "weight_decay": 0.1},
}
each_backend = pytest.mark.parametrize("backend", ["auto", "triton"])
STEPS = 4


def weights(dtype: torch.dtype) -> list[torch.Tensor]:
    """Return parameters in several layouts: rows, channels last, not dense, of one element, empty."""
    draw = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=draw).to(DEVICE, dtype) for shape in ((33, 70), (4, 3, 3, 2), (6, 8), (1,))]
    values[1] = values[1].to(memory_format=torch.channels_last)
    values[2] = values[2][:, ::2]
    return [value.requires_grad_() for value in (*values, torch.empty(0, device=DEVICE, dtype=dtype))]


def gradients(step: int, like: list[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(step + 1)
    return [torch.randn(each.shape, generator=draw).to(DEVICE, dtype) for each in like]


def assert_rounded(shadow: torch.Tensor, master: torch.Tensor) -> None:
    """Assert that a shadow is the rounded master; Triton's interpreter cuts bfloat16 off instead of rounding."""
    rtol = torch.finfo(shadow.dtype).eps if DEVICE == "cpu" and shadow.dtype == torch.bfloat16 else 0.0
    torch.testing.assert_close(shadow, master.to(shadow.dtype), rtol=rtol, atol=0.0)


def assert_as_stock(params: list[torch.Tensor], masters: list[torch.Tensor], optimizer: Any) -> None:
    for weight, master in zip(params, masters, strict=True):
        ours = optimizer.state[weight].get("master", weight)
        torch.testing.assert_close(ours, master, rtol=1e-6, atol=1e-6)
        assert_rounded(weight, ours)


@each_backend
@each_case(SETTINGS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_steps_are_those_of_torch_in_float32(dtype: torch.dtype, case: dict[str, Any], backend: str) -> None:
    params = weights(dtype)
    masters = [p.detach().float().requires_grad_() for p in params]
    ours, stock = fastcnn.optim.SGD(params, **case), torch.optim.SGD(masters, **case)
    with fastcnn.use_backend(backend):
        for step in range(STEPS):
            for p, m, g in zip(params, masters, gradients(step, params, dtype), strict=True):
                p.grad, m.grad = g, g.float()
            ours.step()
            stock.step()
            assert_as_stock(params, masters, ours)
            for p, g in zip(params, gradients(step, params, dtype), strict=True):
                assert p.grad is not None
                assert p.grad.equal(g)  # a step leaves gradients alone


@each_backend
def test_small_updates_are_not_lost(backend: str) -> None:
    weight = torch.ones(8, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
    optimizer = fastcnn.optim.SGD([weight], lr=1e-4)
    with fastcnn.use_backend(backend):
        for _ in range(100):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
    torch.testing.assert_close(weight.float(), torch.full((8,), 0.99, device=DEVICE), rtol=4e-3, atol=0)


def load_best(model: torch.nn.Module, best: dict[str, Any]) -> None:
    model.load_state_dict(best)


def clamp(model: torch.nn.Module, best: dict[str, Any]) -> None:
    for parameter in model.parameters():
        parameter.data.clamp_(-0.1, 0.1)


def set_to_zero(model: torch.nn.Module, best: dict[str, Any]) -> None:
    torch.nn.init.zeros_(model.weight)


SET = {"load_state_dict": load_best, "clamp_": clamp, "init": set_to_zero}


@each_backend
@each_case(SET)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("moved", [False, True], ids=["", "optimizer through a checkpoint"])
def test_weights_set_between_steps_are_kept(case: Any, dtype: torch.dtype, backend: str, moved: bool) -> None:
    model = torch.nn.Linear(4, 3).to(DEVICE, dtype)
    best = copy.deepcopy(model.state_dict())
    optimizer: Any = fastcnn.optim.SGD(model.parameters(), lr=0.1)

    def step() -> None:
        optimizer.zero_grad()
        (model(torch.randn(8, 4, device=DEVICE, dtype=dtype)).float() - 5).square().mean().backward()
        optimizer.step()

    with fastcnn.use_backend(backend):
        for _ in range(5):
            step()
        untouched = copy.deepcopy(model.state_dict())
        case(model, best)
        if moved:
            state = copy.deepcopy(optimizer.state_dict())
            optimizer = fastcnn.optim.SGD(model.parameters(), lr=0.1)
            optimizer.load_state_dict(state)
        wanted = copy.deepcopy(model.state_dict())
        optimizer.param_groups[0]["lr"] = 0.0
        masters = {id(p): optimizer.state[p].get("master", p).clone() for p in model.parameters()}
        step()
    for name, parameter in model.named_parameters():
        assert parameter.equal(wanted[name])
        left_alone = wanted[name].eq(untouched[name])  # these keep the digits that the rounded weight has lost
        master = optimizer.state[parameter].get("master", parameter)
        assert master[left_alone].equal(masters[id(parameter)][left_alone])
        assert master[~left_alone].equal(wanted[name][~left_alone].float())


@each_backend
def test_state_dict_goes_there_and_back(backend: str) -> None:
    def advance(optimizer: Any, params: list[torch.Tensor], steps: range) -> None:
        for step in steps:
            for p, g in zip(params, gradients(step, params, torch.bfloat16), strict=True):
                p.grad = g
            optimizer.step()

    settings = SETTINGS["AlexNet's"]
    with fastcnn.use_backend(backend):
        params = weights(torch.bfloat16)
        through = fastcnn.optim.SGD(params, **settings)
        advance(through, params, range(2))
        resumed = [copy.deepcopy(p.detach()).requires_grad_() for p in params]  # strides too: each takes its kernel
        other = fastcnn.optim.SGD(resumed, lr=1.0)
        other.load_state_dict(copy.deepcopy(through.state_dict()))
        assert all(value.dtype == torch.float32 for state in other.state.values() for value in state.values())
        advance(through, params, range(2, 4))
        advance(other, resumed, range(2, 4))
    for mine, theirs in zip(resumed, params, strict=True):
        assert_rounded(mine, theirs)
        torch.testing.assert_close(other.state[mine]["master"], through.state[theirs]["master"], rtol=1e-6, atol=1e-6)


@each_backend
def test_learning_rate_in_a_tensor_and_schedulers(backend: str) -> None:
    params = weights(torch.float32)
    masters = [p.detach().clone().requires_grad_() for p in params]
    rate = torch.tensor(0.1, device=DEVICE)
    ours, stock = fastcnn.optim.SGD(params, lr=rate, momentum=0.5), torch.optim.SGD(masters, lr=0.1, momentum=0.5)
    schedules = [torch.optim.lr_scheduler.StepLR(each, 1, 0.5) for each in (ours, stock)]
    with fastcnn.use_backend(backend):
        for step in range(3):
            for p, m, g in zip(params, masters, gradients(step, params, torch.float32), strict=True):
                p.grad, m.grad = g, g.clone()
            for each in (ours, stock, *schedules):
                each.step()
    assert_as_stock(params, masters, ours)


@each_backend
def test_parameters_without_gradients_and_closures(backend: str) -> None:
    first, second = (torch.ones(3, device=DEVICE, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    optimizer = fastcnn.optim.SGD([{"params": [first], "lr": 1.0}, {"params": [second]}], lr=0.5)

    def closure() -> Any:
        optimizer.zero_grad()
        loss = first.sum()
        loss.backward()
        return loss

    with fastcnn.use_backend(backend):
        assert optimizer.step(closure).item() == 3
    assert first.eq(0).all()
    assert second.eq(1).all()
    assert second not in optimizer.state


def test_gradient_in_another_memory_format() -> None:
    weight = torch.zeros(2, 3, 2, 2, device=DEVICE, requires_grad=True)
    weight.grad = torch.randn(2, 3, 2, 2, device=DEVICE).to(memory_format=torch.channels_last)
    with fastcnn.use_backend("triton"):
        fastcnn.optim.SGD([weight], lr=1.0).step()
    assert weight.equal(-weight.grad)


class Counted:
    """Stands in for the kernel: notes of each launch whether it loads vectors, and how many programs it has."""

    def __init__(self) -> None:
        self.launches: list[tuple[bool, int]] = []
        self.kernel = sgd.sgd_kernel

    def __getitem__(self, grid: tuple[int]) -> Any:
        def launch(*args: Any, **constants: Any) -> None:
            self.launches.append((constants["ALIGNED"], grid[0]))
            self.kernel[grid](*args, **constants)

        return launch


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    kernel = Counted()
    monkeypatch.setattr(sgd, "sgd_kernel", kernel)
    return kernel


def shifted(values: torch.Tensor) -> torch.Tensor:
    """Return the values behind one element, as gradients in a bucket may be."""
    flat = torch.cat([values.new_zeros(1), values.flatten()])
    return flat[1:].view(values.shape)


def test_one_launch_updates_all_parameters_of_a_kind(counted: Counted) -> None:
    sizes = [*range(1, 36), sgd.BLOCK - 1, sgd.BLOCK, 2 * sgd.BLOCK + 1]
    draw = torch.Generator().manual_seed(0)
    params = [
        torch.randn(size, generator=draw).to(DEVICE, dtype).requires_grad_()
        for size in sizes
        for dtype in (torch.float32, torch.bfloat16)
    ]
    masters = [p.detach().float().requires_grad_() for p in params]
    settings = SETTINGS["AlexNet's"]
    ours, stock = fastcnn.optim.SGD(params, **settings), torch.optim.SGD(masters, **settings)
    with fastcnn.use_backend("triton"):
        for step in range(2):
            for p, m, g in zip(params, masters, gradients(step, params, torch.bfloat16), strict=True):
                p.grad, m.grad = g.to(p.dtype), g.float()
            ours.step()
            stock.step()
            assert_as_stock(params, masters, ours)
    # by vectors those of 8, 16, 24, 32 and BLOCK elements, in float32 and in bfloat16, twice
    assert counted.launches == 4 * [(True, 5), (False, 31 + 1 + 3)]


def test_gradients_without_alignment_are_read_by_value(counted: Counted) -> None:
    params = [torch.ones(6, 4, device=DEVICE, requires_grad=True) for _ in range(3)]
    params[2].grad = torch.randn(6, 4, device=DEVICE)
    for p in params[:2]:
        p.grad = shifted(torch.randn(6, 4, device=DEVICE))
    with fastcnn.use_backend("triton"):
        fastcnn.optim.SGD(params, lr=1.0).step()
    for p in params:
        assert p.grad is not None
        assert p.equal(1 - p.grad)
    assert sorted(counted.launches) == [(False, 2), (True, 1)]


def test_the_table_of_pointers_is_kept_between_steps() -> None:
    params = weights(torch.bfloat16)[:1]
    for p, g in zip(params, gradients(0, params, torch.bfloat16), strict=True):
        p.grad = torch.empty_like(p).copy_(g)
    optimizer = fastcnn.optim.SGD(params, lr=0.1)
    with fastcnn.use_backend("triton"):
        optimizer.step()
        before = sgd._kept_table.cache_info()
        optimizer.step()
        assert sgd._kept_table.cache_info().misses == before.misses
        assert sgd._kept_table.cache_info().hits == before.hits + 1
        params[0].grad = params[0].grad.clone()
        optimizer.step()
        assert sgd._kept_table.cache_info().misses == before.misses + 1


def test_a_step_that_is_refused_leaves_no_state(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise RuntimeError("refused")

    monkeypatch.setattr("fastcnn.optim.choose", refuse)
    weight = torch.ones(3, device=DEVICE, requires_grad=True)
    weight.grad = torch.ones_like(weight)
    optimizer = fastcnn.optim.SGD([weight], lr=1.0, momentum=0.9)
    with fastcnn.use_backend("triton"), pytest.raises(RuntimeError, match="refused"):
        optimizer.step()
    assert not optimizer.state


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "lr": ({"lr": -1.0}, "'lr': expected no negative number, got -1.0"),
    "momentum": ({"momentum": -0.5}, "'momentum': expected no negative"),
    "weight decay": ({"weight_decay": -0.5}, "'weight_decay': expected no negative"),
    "nesterov without momentum": ({"nesterov": True}, "'nesterov': expected momentum > 0"),
    "nesterov with dampening": (
        {"nesterov": True, "momentum": 0.9, "dampening": 0.1},
        "expected momentum > 0 and dampening 0",
    ),
}


@each_case(MISTAKES)
def test_mistakes(case: Any) -> None:
    settings, message = case
    with pytest.raises(ValueError, match=message):
        fastcnn.optim.SGD([torch.ones(1, requires_grad=True)], **settings)


def test_other_dtypes_are_refused() -> None:
    weight = torch.ones(2, dtype=torch.float64, requires_grad=True)
    weight.grad = torch.ones_like(weight)
    with pytest.raises(TypeError, match="float32, bfloat16 or float16, got"):
        fastcnn.optim.SGD([weight]).step()
