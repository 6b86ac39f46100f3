"""The front: plans serve the calls that they were made for and no others, and its nodes behave as any of autograd's."""

import contextlib
import gc
import subprocess
import sys
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

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
        return plans._plan_max_pool(*arguments)

    def python(*arguments):
        counts["python"] += 1
        return max_pool.max_pool(*arguments)

    run = front.fronted("max_pool", plan, max_pool._prepare, python)

    def pool(input, size=2, stride=None, padding=0, dilation=1, ceil_mode=False):
        return run(input, size, stride, padding, dilation, ceil_mode, False)

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
def test_another_state_is_planned_anew(state, counted):
    x = image()
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
            front.forget()
        return plans._plan_max_pool(*arguments)

    run = front.fronted("max_pool", plan, max_pool._prepare, max_pool.max_pool)
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


def weights():
    return torch.randn(4, 3, 3, 3, requires_grad=True), torch.randn(4, requires_grad=True)


def conv(x, w, b):
    return FF.conv2d_relu_max_pool2d(x, w, b, padding=1, pool_size=2)


def stock_conv(x, w, b):
    return F.max_pool2d(F.relu(F.conv2d(x, w, b, padding=1)), 2)


def test_saved_tensors_that_change_in_place_are_found_out(backend):
    x, (w, b) = image(grad=True), weights()
    output = conv(x, w, b)
    with torch.no_grad():
        w.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_an_output_that_changes_in_place_is_found_out():
    with fastcnn.use_backend("cpu"):
        x, (w, b) = image(grad=True), weights()
        output = FF.conv2d_relu(x, w, b)
        output.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.sum().backward()


def test_a_graph_runs_twice_only_if_it_is_retained(backend):
    x, (w, b) = image(grad=True), weights()
    output = conv(x, w, b)
    first = torch.autograd.grad(output.sum(), (x, w, b), retain_graph=True)
    second = torch.autograd.grad(output.sum(), (x, w, b))
    assert all(map(torch.equal, first, second))
    with pytest.raises(RuntimeError, match="second time"):
        output.sum().backward()


def test_gradients_of_some_inputs_only(backend):
    (w, b), x = weights(), image(grad=True)
    for wanted in ((x,), (w,), (b,), (x, b), (w, b)):
        ours = torch.autograd.grad(conv(x, w, b).square().sum(), wanted)
        stock = torch.autograd.grad(stock_conv(x, w, b).square().sum(), wanted)
        for mine, theirs in zip(ours, stock):
            torch.testing.assert_close(mine, theirs)
    frozen = conv(x, w.detach(), b.detach())
    frozen.sum().backward()
    assert x.grad is not None
    assert w.grad is None


def test_nodes_have_names_hooks_and_a_past(backend):
    x, (w, b) = image(grad=True), weights()
    seen = []
    output = FF.conv2d_relu(x * 1, w, b)
    node = output.grad_fn
    if backend == "cpu":
        assert node.name() == "ConvReLUBackward"
        assert type(node).__name__ == "ConvReLUBackward"
        assert node.next_functions[0][0].name() == "MulBackward0"
    node.register_hook(lambda *_: seen.append("after"))
    node.register_prehook(lambda *_: seen.append("before"))
    output.register_hook(lambda grad: seen.append("tensor"))
    output.retain_grad()
    output.sum().backward()
    assert seen == ["tensor", "before", "after"]
    assert torch.equal(output.grad, torch.ones_like(output))


def test_anomaly_mode_names_the_call(backend):
    x, (w, b) = image(grad=True), weights()
    with torch.autograd.detect_anomaly(check_nan=True):
        output = conv(x, w, b)
        with pytest.warns(UserWarning, match="test_front"), pytest.raises(RuntimeError, match="returned nan"):
            (output * float("nan")).sum().backward()


def test_views_and_strides(backend):
    (w, b), base = weights(), image(2, 8, 8, 3, grad=True)
    for x in (base.permute(0, 3, 1, 2), base[:, ::2].permute(0, 3, 1, 2), base[:1].expand(2, 8, 8, 3).movedim(3, 1)):
        ours, stock = (torch.autograd.grad(f(x, w, b).square().sum(), (base, w, b)) for f in (conv, stock_conv))
        for mine, theirs in zip(ours, stock):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_second_derivatives_after_the_first_of_a_retained_graph():
    with fastcnn.use_backend("cpu"):
        x, (w, b) = image(grad=True), weights()
        output, stock = conv(x, w, b), stock_conv(x, w, b)
        for _ in range(2):
            results = []
            for y in (output, stock):
                (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
                results.append(torch.autograd.grad(gradient.square().sum(), (x, w, b), retain_graph=True))
            for mine, theirs in zip(*results):
                torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-3)


def test_what_a_second_derivative_depends_on_is_stocks():
    with fastcnn.use_backend("cpu"):
        x = image(grad=True)
        for pool in (lambda y: FF.max_pool2d(y, 2), lambda y: F.max_pool2d(y, 2)):
            (gradient,) = torch.autograd.grad(pool(x).sum(), x, create_graph=True)
            assert gradient.requires_grad
            (second,) = torch.autograd.grad(gradient.sum(), x)
            assert torch.equal(second, torch.zeros_like(x))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(backend, reentrant):
    x, (w, b) = image(grad=True), weights()
    checkpointed = checkpoint(conv, x, w, b, use_reentrant=reentrant)
    ours = torch.autograd.grad(conv(x, w, b).sum(), (x, w, b))
    checkpointed.sum().backward()
    for mine, tensor in zip(ours, (x, w, b)):
        torch.testing.assert_close(mine, tensor.grad)


def test_nested_autocast(backend):
    x, (w, b) = image(grad=True), weights()
    with torch.autocast("cpu", torch.bfloat16):
        assert conv(x, w, b).dtype == torch.bfloat16
        with torch.autocast("cpu", enabled=False):
            assert conv(x, w, b).dtype == torch.float32
        output = conv(x, w, b)
    output.float().sum().backward()
    assert w.grad.dtype == torch.float32
    assert conv(x, w, b).dtype == torch.float32


def test_inference_tensors(backend):
    w, b = weights()
    with torch.inference_mode():
        x = image()
        assert conv(x, w, b).is_inference()
    with torch.no_grad():
        assert torch.equal(conv(x, w, b), conv(x.clone(), w, b))
    with pytest.raises(RuntimeError, match="Inference tensors"):
        conv(x, w, b)


def test_threads_share_plans_and_graphs():
    """Forward and backward in many threads, while others choose backends; each for itself."""
    x, (w, b) = image(), weights()
    expected = torch.autograd.grad(stock_conv(x, w, b).square().sum(), (w, b))
    failures = []

    def work(name):
        try:
            for turn in range(30):
                with fastcnn.use_backend(name):
                    size = 4 + turn % 5
                    part = conv(x[..., :size, :size], w, b)
                    assert ("ConvReLUPool" in part.grad_fn.name()) == (name == "cpu")
                    ours = torch.autograd.grad(conv(x, w, b).square().sum(), (w, b))
                    for mine, theirs in zip(ours, expected):
                        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)
        except Exception as error:
            failures.append(error)

    workers = [threading.Thread(target=work, args=(name,)) for name in ("cpu", "torch") * 3]
    for each in workers:
        each.start()
    for each in workers:
        each.join()
    assert not failures


def test_a_graph_is_run_backward_by_two_threads():
    with fastcnn.use_backend("cpu"):
        x, (w, b) = image(grad=True), weights()
        output = conv(x, w, b).square().sum()
        found = []
        workers = [
            threading.Thread(target=lambda: found.append(torch.autograd.grad(output, (x, w, b), retain_graph=True)))
            for _ in range(4)
        ]
        for each in workers:
            each.start()
        for each in workers:
            each.join()
        assert len(found) == 4
        assert all(torch.equal(mine, first) for each in found for mine, first in zip(each, found[0]))


def test_running_statistics_count_as_changed(backend):
    x, mean, variance = image(4, 3, 4, 4), torch.zeros(3), torch.ones(3)
    stock = mean.clone(), variance.clone()
    version = mean._version
    FF.batch_norm_relu(x, mean, variance, training=True)
    F.batch_norm(x, *stock, training=True)
    if backend == "cpu":
        assert mean._version > version
    torch.testing.assert_close(mean, stock[0])
    torch.testing.assert_close(variance, stock[1])


def test_a_compiled_graph_leaves_the_front_out():
    x, (w, b) = image(), weights()
    with fastcnn.use_backend("cpu"):
        compiled = torch.compile(conv, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x, w, b), conv(x, w, b))


OTHER_TORCH = """
import torch
torch.__version__ = torch.torch_version.TorchVersion("99.0.0")
import fastcnn
from fastcnn import front
assert "built for torch" in front.problem, front.problem
print(fastcnn.functional.max_pool2d(torch.ones(1, 1, 2, 2), 2).item())
"""


def test_beside_another_torch_it_steps_aside():
    done = subprocess.run([sys.executable, "-c", OTHER_TORCH], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "1.0"
