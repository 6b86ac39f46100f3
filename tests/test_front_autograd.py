"""The front's autograd nodes and calls behave as any of torch's: saved tensors, hooks, threads, second derivatives."""

import importlib.util
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
import torch._dynamo.compiled_autograd
import torch.nn.functional as F
from test_front import backend, image
from torch.utils.checkpoint import checkpoint

import fastcnn
import fastcnn.functional as FF
from fastcnn import front

__all__ = ["backend"]
pytestmark = [
    pytest.mark.skipif(front._front is None, reason=f"the front serves here: {front.problem}"),
    pytest.mark.skipif(not fastcnn.backends()["cpu"].available, reason="needs the compiled kernels"),
]


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


def test_where_the_linker_finds_another_torch_it_says_so(monkeypatch):
    def refuse(name):
        raise ImportError(f"/{name}.so: undefined symbol: _ZN5torch8autograd4Node17release_resourcesEv")

    monkeypatch.setattr("fastcnn.front.importlib", SimpleNamespace(import_module=refuse, util=importlib.util))
    found, problem = front._load()
    assert found is None
    assert problem.startswith(f"it was built for another torch, this is torch {torch.__version__}; build it again: pip")


def test_compiled_autograd_runs_the_nodes(backend):
    x, (w, b) = image(grad=True), weights()
    output = FF.linear_relu(conv(x, w, b).flatten(1), torch.randn(5, 64))
    expected = torch.autograd.grad(output.sum(), (x, w, b), retain_graph=True)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        found = torch.autograd.grad(output.sum(), (x, w, b))
    assert all(map(torch.equal, found, expected))


def test_a_stage_that_follows_masks_for_one_of_the_front():
    """Our dgrad applies the ReLU of the stage before, and sums its bias gradient: the node of that stage is told."""
    from fastcnn.ops.gradients import only_reader

    if not fastcnn.backends()["triton"].available:
        pytest.skip("needs Triton")
    x, (w, b), second = image(1, 3, 5, 5, grad=True), weights(), torch.randn(4, 4, 3, 3, requires_grad=True)
    found = []
    for algorithm in ("epilogue", "epilogue+dgrad"):
        with fastcnn.use_backend("triton", algorithm="epilogue"):
            middle = FF.conv2d_relu(x, w, b, padding=1)
        only_reader(middle)
        with fastcnn.use_backend("triton", algorithm=algorithm):
            output = FF.conv2d_relu(middle, second, padding=1)
        assert middle.grad_fn.masked is (algorithm != "epilogue")
        found.append(torch.autograd.grad(output.sum(), (x, w, b, second)))
    for mine, theirs in zip(*found):
        torch.testing.assert_close(mine, theirs, rtol=1e-2, atol=1e-2)
