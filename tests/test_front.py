"""The front: plans serve the calls that they were made for and no others, and its nodes behave as any of autograd's."""

import contextlib
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import make_fx

import fastcnn
import fastcnn.functional as FF
from fastcnn import front
from fastcnn.ops import max_pool, plans

pytestmark = [
    pytest.mark.skipif(front._front is None, reason=f"the front serves here: {front.problem}"),
    pytest.mark.skipif(not fastcnn.backends()["cpu"].available, reason="needs the compiled kernels"),
]


@pytest.fixture(params=["cpu", "torch"])
def backend(request):
    with fastcnn.use_backend(request.param):
        yield request.param


@pytest.fixture
def counted():
    """Return a max_pool that counts how often it is planned, and how often it goes down the Python path."""
    counts = {"planned": 0, "python": 0}

    def plan(*arguments):
        counts["planned"] += 1
        return plans.plan(max_pool.OP, *arguments)

    def python(*arguments):
        counts["python"] += 1
        return max_pool.OP.python(*arguments)

    run = front.fronted("max_pool", plan, max_pool.OP.prepare, python)

    def pool(input, size=2, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False):
        return run(input, size, stride, padding, dilation, ceil_mode, return_indices)

    pool.counts = counts
    return pool


def image(*shape, grad=False):
    return torch.randn(*(shape or (2, 3, 8, 8)), requires_grad=grad)


def test_a_call_is_planned_once(backend, counted):
    x = image()
    for _ in range(3):
        assert torch.equal(counted(x), F.max_pool2d(x, 2))
    assert torch.equal(counted(image()), counted(image())) is False
    assert counted.counts == {"planned": 1, "python": 0}


@pytest.mark.parametrize("grad", [False, True])
def test_a_stock_pool_gives_its_indices(grad, counted):
    x = image(grad=grad)
    with fastcnn.use_backend("auto"):
        results = counted(x, return_indices=True)
        assert torch.equal(counted(x), results[0])  # the same call without indices has a plan of its own
    assert type(results) is tuple
    assert all(map(torch.equal, results, F.max_pool2d(x, 2, return_indices=True)))
    assert [each.requires_grad for each in results] == [grad, False]
    assert counted.counts == {"planned": 2, "python": 0}
    if grad:
        weights = torch.randn_like(results[0])
        (expected,) = torch.autograd.grad((F.max_pool2d(x, 2) * weights).sum(), x)
        assert torch.equal(torch.autograd.grad((results[0] * weights).sum(), x)[0], expected)


def test_a_list_that_changes_is_another_call(backend, counted):
    x, size = image(), [2, 2]
    assert counted(x, size).shape == (2, 3, 4, 4)
    size[0] = 4
    assert torch.equal(counted(x, size), F.max_pool2d(x, (4, 2)))
    size.append(3)
    with pytest.raises((TypeError, RuntimeError)):
        counted(x, size)
    assert counted(x, (2, 2)).shape == (2, 3, 4, 4)


CHANGES = {
    "strides": lambda x: x.as_strided_((2, 3, 4, 4), (96, 1, 12, 3)),
    "shape": lambda x: x.resize_(2, 3, 4, 8),
    "axes": lambda x: x.squeeze_(0) if x.shape[0] == 1 else x.transpose_(1, 3),
    "dtype": lambda x: setattr(x, "data", x.data.double()),
    "grad": lambda x: x.requires_grad_(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_tensor_that_changes_in_place_is_another_call(change, counted):
    with fastcnn.use_backend("auto"):
        x = image()
        counted(x)
        change(x)
        output = counted(x)
        stock = F.max_pool2d(x, 2)
        assert torch.equal(output, stock)
        assert output.dtype == stock.dtype
        assert output.stride() == stock.stride()
        assert output.requires_grad == stock.requires_grad
        assert counted.counts["planned"] == 2


def test_numbers_that_are_equal_but_of_another_type_are_other_calls(backend):
    x = image()
    assert FF.max_pool2d(x, 2, 1).shape == (2, 3, 7, 7)
    for odd in (1.0, True, "1"):
        with front.aside(), pytest.raises((TypeError, RuntimeError)) as python:
            FF.max_pool2d(x, 2, odd)
        with pytest.raises(python.type, match=r".*") as fronted:
            FF.max_pool2d(x, 2, odd)
        assert str(fronted.value) == str(python.value)
    assert torch.equal(FF.local_response_norm(x, 3, 1, 1, 1), FF.local_response_norm(x, 3, 1.0, 1.0, 1.0))
    with pytest.raises(TypeError):
        FF.local_response_norm(x, 3.0)


def test_the_sign_of_zero_and_nan_are_other_numbers(counted):
    x = image()
    assert torch.equal(FF.local_response_norm(x, 3, 0.0), FF.local_response_norm(x, 3, -0.0))
    assert FF.local_response_norm(x, 3, float("nan")).isnan().all()


@contextlib.contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def deterministic():
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(not before[0])
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


STATES = {
    "backend": lambda: fastcnn.use_backend("torch"),
    "threads": lambda: threads(torch.get_num_threads() + 1),
    "determinism": deterministic,
    "no grad": torch.no_grad,
    "inference mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast of another dtype": lambda: torch.autocast("cpu", torch.float16),
}


@pytest.mark.parametrize("state", STATES.values(), ids=STATES)
def test_another_state_is_planned_anew_and_once(state, counted):
    x = image()
    for _ in range(2):
        counted(x)
        with state():
            assert torch.equal(counted(x), F.max_pool2d(x, 2))
    assert counted.counts == {"planned": 2, "python": 0}


def test_plans_are_forgotten_with_the_tables(counted):
    from fastcnn import tuning

    x = image()
    counted(x)
    tuning.forget()
    assert front._front.plans() == 0
    counted(x)
    assert counted.counts["planned"] == 2


def test_a_plan_made_while_the_backend_changes_is_not_kept():
    x, asked = image(), []

    def plan(*arguments):
        asked.append(1)
        if len(asked) == 1:
            with fastcnn.use_backend("torch"):
                pass
        return plans.plan(max_pool.OP, *arguments)

    run = front.fronted("max_pool", plan, max_pool.OP.prepare, max_pool.OP.python)
    for _ in range(3):
        run(x, 2, None, 0, 1, False, False)
    assert len(asked) == 2


def test_the_number_of_plans_is_bounded(counted):
    for rows in range(2, 1400):
        counted(torch.empty(1, 1, rows, 2))
    assert front._front.plans() <= 1024
    assert counted.counts["planned"] == 1398


def test_a_plan_keeps_no_argument_alive(counted):
    x = image(grad=True)
    seen = weakref.ref(x)
    counted(x)
    del x
    gc.collect()
    assert seen() is None


class Watching(torch.Tensor):
    pass


def dual(pool, x):
    with torch.autograd.forward_ad.dual_level():
        return pool(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))


def with_hooks(pool, x):
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        return pool(x)


def in_mode(mode):
    def run(pool, x):
        with mode():
            return pool(x)

    return run


class FunctionMode(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class DispatchMode(torch.utils._python_dispatch.TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


NOT_TAKEN = {
    "a subclass": lambda pool, x: pool(x.as_subclass(Watching)),
    "torch.func": lambda pool, x: torch.func.grad(lambda y: pool(y).sum())(x),
    "vmap": lambda pool, x: torch.vmap(pool)(x[None]),
    "tracing": lambda pool, x: torch.jit.trace(pool, x, check_trace=False)(x),
    "make_fx": lambda pool, x: make_fx(lambda y: pool(y))(x),
    "hooks on saved tensors": with_hooks,
    "forward mode": dual,
    "a function mode": in_mode(FunctionMode),
    "a dispatch mode": in_mode(DispatchMode),
    "listening to routes": lambda pool, x: in_mode(lambda: fastcnn.route.listening(lambda *_: None))(pool, x),
    "a lazy negation": lambda pool, x: pool(torch._neg_view(x)),
    "sparse": lambda pool, x: pool(x.to_sparse()),
    "meta": lambda pool, x: pool(x.to("meta")),
    "an odd argument": lambda pool, x: pool(x, torch.Size((2, 2))),
}


@pytest.mark.parametrize("call", NOT_TAKEN.values(), ids=NOT_TAKEN)
def test_what_the_front_does_not_take_goes_down_the_python_path(call, counted):
    with fastcnn.use_backend("auto"), contextlib.suppress(NotImplementedError, RuntimeError, TypeError):
        call(counted, image(grad=True) if call is with_hooks else image())
    assert counted.counts["planned"] == 0
    assert counted.counts["python"] > 0
    counted(image())
    assert counted.counts["planned"] == 1  # and the front is back
