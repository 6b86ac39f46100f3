"""Stages with batch norm: running statistics, folding, mixed precision, compiled and captured steps."""

import copy

import played_graphs
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastcnn
from fastcnn.train import GraphedStep

played = played_graphs.played  # a fixture

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KERNELS = [name for name in ("triton", "cpu", "cuda") if fastcnn.backends()[name].available]
each_kernels = pytest.mark.parametrize("backend", KERNELS)

NORMS = {
    "as it comes": {},
    "momentum": {"momentum": 0.4},
    "average over all batches": {"momentum": None},
    "no running statistics": {"track_running_stats": False},
    "not affine": {"affine": False},
    "large eps": {"eps": 0.3},
}


def images(seed=0, dtype=torch.float32):
    return torch.randn(3, 3, 8, 7, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def network(*, pool=True, **norm):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4, **norm), nn.ReLU()]
    model = nn.Sequential(*layers, *([nn.MaxPool2d(2)] if pool else [])).to(DEVICE)
    if model[1].affine:
        nn.init.uniform_(model[1].weight, -2.0, 2.0)
        nn.init.normal_(model[1].bias)
    return model


def twins(**settings):
    stock = network(**settings)
    return fastcnn.nn.Sequential(*copy.deepcopy(stock)), stock


def assert_same_state(fused, stock):
    for (name, mine), theirs in zip(fused.state_dict().items(), stock.state_dict().values(), strict=True):
        assert mine.dtype == theirs.dtype
        torch.testing.assert_close(mine, theirs, msg=lambda text, name=name: f"{name}: {text}")


def gradients(model, x):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(model(x).float().square().sum(), [x, *model.parameters()])


def assert_gradients_close(actual, expected, tolerance=1e-5):
    """Compare to the largest of all: a norm takes off any bias before it, whose gradient is rounding alone."""
    largest = max(each.abs().max().item() for each in expected)
    for mine, theirs in zip(actual, expected, strict=True):
        assert mine.dtype == theirs.dtype
        torch.testing.assert_close(mine, theirs, rtol=0, atol=tolerance * largest)


@each_kernels
@pytest.mark.parametrize("pool", [True, False], ids=["pool", "no pool"])
@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_trains_and_evaluates_as_stock(norm, pool, backend):
    fused, stock = twins(pool=pool, **norm)
    with fastcnn.use_backend(backend):
        for seed in (0, 1):
            torch.testing.assert_close(fused(images(seed)), stock(images(seed)))
        assert_gradients_close(gradients(fused, images()), gradients(stock, images()))
        assert_same_state(fused, stock)
        fused.eval(), stock.eval()
        torch.testing.assert_close(fused(images(2)), stock(images(2)))
        assert_gradients_close(gradients(fused, images()), gradients(stock, images()))
        with torch.no_grad():
            torch.testing.assert_close(fused(images(2)), stock(images(2)))
        assert_same_state(fused, stock)


@each_kernels
def test_frozen_norm_in_a_model_that_trains(backend):
    fused, stock = twins()
    for model in (fused, stock):
        model[1].eval()
        model[1].requires_grad_(False)
    with fastcnn.use_backend(backend):
        for model in (fused, stock):
            loss = model(images()).square().sum()
            loss.backward()
    torch.testing.assert_close(fused[0].weight.grad, stock[0].weight.grad)
    assert_same_state(fused, stock)


@pytest.fixture
def convolutions(monkeypatch):
    """The weights that convolutions have run with."""
    seen = []
    for name in ("conv2d_relu", "conv2d_relu_max_pool2d"):
        function = getattr(fastcnn.functional, name)

        def call(input, weight, *rest, _function=function, **settings):
            seen.append(weight)
            return _function(input, weight, *rest, **settings)

        monkeypatch.setattr(fastcnn.functional, name, call)
    return seen


@each_kernels
def test_folds_where_nobody_wants_a_gradient(backend, convolutions):
    fused, stock = twins()
    fused.eval(), stock.eval()
    with fastcnn.use_backend(backend), torch.no_grad():
        fused(images())
        assert len(convolutions) == 1
        scale = stock[1].weight / (stock[1].running_var + stock[1].eps).sqrt()
        torch.testing.assert_close(convolutions[0], stock[0].weight * scale[:, None, None, None])
        fused[1].running_mean += 3.0  # the next call sees it
        stock[1].running_mean += 3.0
        torch.testing.assert_close(fused(images()), stock(images()))
        fused.train()(images())
    fused.eval()(images())
    with fastcnn.use_backend("torch"), torch.no_grad():
        fused(images())
    assert len(convolutions) == 2


@each_kernels
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_folded_stays_within_twice_the_stock_error(dtype, bias, backend):
    torch.manual_seed(1)
    conv, norm = nn.Conv2d(16, 24, 3, padding=1, bias=bias), nn.BatchNorm2d(24)
    stock = nn.Sequential(conv, norm, nn.ReLU()).to(DEVICE)
    x = torch.randn(4, 16, 9, 8).to(DEVICE)
    stock(x)
    exact = copy.deepcopy(stock).eval().to(dtype).double()
    stock = stock.eval().to(dtype)
    x = x.to(dtype)
    with torch.no_grad():
        truth, theirs = exact(x.double()), stock(x)
        with fastcnn.use_backend(backend):
            mine = fastcnn.nn.Sequential(*stock)(x)
    error, allowed = (mine - truth).abs().max().item(), 2 * (theirs - truth).abs().max().item()
    assert error <= allowed + torch.finfo(dtype).eps * truth.abs().max().item()


@each_kernels
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_autocast(training, backend):
    fused, stock = twins()
    fused.train(training), stock.train(training)
    with fastcnn.use_backend(backend):
        for grad in (True, False):
            with torch.autocast(DEVICE, torch.bfloat16), torch.set_grad_enabled(grad):
                mine, theirs = fused(images()), stock(images())
            assert mine.dtype == theirs.dtype
            torch.testing.assert_close(mine, theirs, rtol=0.05, atol=0.05)
        with torch.autocast(DEVICE, torch.bfloat16):
            assert_gradients_close(gradients(fused, images()), gradients(stock, images()), tolerance=0.05)
    for a, b in zip(fused.buffers(), stock.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_compiles_without_a_break_and_counts_each_batch_once(backend):
    fused, stock = twins()
    torch._dynamo.reset()
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    with fastcnn.use_backend(backend):
        for seed in range(3):
            torch.testing.assert_close(compiled(images(seed)), stock(images(seed)))
        assert_gradients_close(gradients(compiled, images()), gradients(stock, images()))
        assert fused[1].num_batches_tracked == 4
        assert_same_state(fused, stock)
        fused.eval(), stock.eval()
        with torch.no_grad():
            torch.testing.assert_close(compiled(images()), stock(images()))


@pytest.mark.parametrize("backend", ["auto", *KERNELS])
def test_compiles_the_average_over_all_batches_as_stock(backend):
    """In training stock reads the count of batches in Python, which breaks the graph; so does ours at worst."""
    fused, stock = twins(momentum=None)
    torch._dynamo.reset()
    compiled = torch.compile(fused, backend="aot_eager")
    with fastcnn.use_backend(backend):
        for seed in range(3):
            torch.testing.assert_close(compiled(images(seed)), stock(images(seed)))
        assert_same_state(fused, stock)
        fused.eval(), stock.eval()
        torch._dynamo.reset()
        whole = torch.compile(fused, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(whole(images()), stock(images()))


@each_kernels
def test_captured_step_updates_the_running_statistics(played, backend):
    if DEVICE == "cuda":
        pytest.skip("graphs are played on the CPU")
    fused, stock = twins()

    def stepping(model):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

        def step(x, _labels):
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            optimizer.step()
            return loss.detach()

        return step, optimizer

    labels = torch.zeros(3)
    with fastcnn.use_backend(backend):
        graphed = GraphedStep(*stepping(fused))
        for seed in range(6):
            torch.testing.assert_close(graphed(images(seed), labels), stepping(stock)[0](images(seed), labels))
    assert played.recorded == 1
    assert fused[1].num_batches_tracked == 6
    assert_same_state(fused, stock)


def test_sync_batch_norm_is_left_alone(monkeypatch):
    monkeypatch.setattr(fastcnn.functional, "batch_norm_relu", None)
    model = fastcnn.nn.Sequential(nn.Conv2d(3, 4, 3), nn.SyncBatchNorm(4), nn.ReLU()).eval()
    stock = nn.Sequential(*model)
    torch.testing.assert_close(model(images().cpu()), stock(images().cpu()))


def test_hook_on_the_norm_sees_its_output(monkeypatch):
    monkeypatch.setattr(fastcnn.functional, "batch_norm_relu_max_pool2d", None)
    fused, stock = twins()
    seen = []
    fused[1].register_forward_hook(lambda layer, args, output: seen.append(output))
    torch.testing.assert_close(fused(images()), stock(images()))
    assert len(seen) == 1
    assert seen[0].min() < 0


def test_functional_call_and_per_sample_gradients_run_stock():
    fused, stock = twins()
    fused.eval(), stock.eval()

    def per_sample(model):
        def loss(parameters, x):
            return torch.func.functional_call(model, (parameters, dict(model.named_buffers())), x[None]).square().sum()

        return torch.func.vmap(torch.func.grad(loss), (None, 0))(dict(model.named_parameters()), images())

    for mine, theirs in zip(per_sample(fused).values(), per_sample(stock).values(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_wrong_rank_is_torchs_error():
    fused, _ = twins()
    with pytest.raises(ValueError, match="expected 4D input"):
        fastcnn.nn.Sequential(*list(fused)[1:])(images()[0])
    with pytest.raises(ValueError, match="expected 4D input"):
        fused(images()[0])


def test_one_function_serves_a_norm_in_evaluation_without_running_statistics():
    fused, stock = twins(track_running_stats=False)
    fused.eval(), stock.eval()
    with torch.no_grad():
        torch.testing.assert_close(fused(images()), F.max_pool2d(stock[:3](images()), 2))


@pytest.mark.parametrize("backend", ["auto", "cpu", "torch"])
@torch.no_grad()
def test_a_stride_of_zero_is_named_in_an_error(backend):
    model = fastcnn.fuse(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())).eval()
    model[0].stride = (0, 0)
    with fastcnn.use_backend(backend), pytest.raises(RuntimeError, match="stride"):
        model(torch.randn(2, 3, 16, 16))
