"""Tensor subclasses, modes and transforms that know nothing of our operators: they meet the stock layers."""

import functools
import os

import pytest
import torch
import torch.distributed as dist
from parity import COMPILED
from stages import DEVICE, IMAGE, STAGES, each_stage, kernels_in_float32, loss_of, randn
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map, tree_map_only
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import fastcnn
import fastcnn.functional as FF

KERNELS = [name for name, _ in COMPILED] or ["triton"]


@pytest.fixture(autouse=True)
def _kernels_for_everything(monkeypatch):
    """Let `auto` take a kernel for every op."""
    from fastcnn.route import Fastest

    table = {(DEVICE, op): Fastest(KERNELS[0], (torch.float32,)) for op in OPS}
    monkeypatch.setattr("fastcnn.route.FASTEST", table)


OPS = (
    "add_relu",
    "bn_relu",
    "bn_relu_pool",
    "conv_relu",
    "conv_relu_pool",
    "linear_relu",
    "lrn",
    "lrn_pool",
    "max_pool",
)


class Boxed(torch.Tensor):
    """Holds a tensor, and runs only torch's own operators on it."""

    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype, device=held.device)

    def __init__(self, held):
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        assert func.namespace == "aten", func
        args, kwargs = tree_map(lambda each: each.held if isinstance(each, Boxed) else each, (args, kwargs or {}))
        return tree_map_only(torch.Tensor, Boxed, func(*args, **kwargs))


class Named(torch.Tensor):
    """Sees calls of torch's functions, and nothing below them."""

    seen: list = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.seen.append(func)
        return super().__torch_function__(func, types, args, kwargs)


class Functions(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


class Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


def norm(x, w, b):
    return FF.batch_norm_relu_max_pool2d(x, None, None, w, b, training=True, pool_size=2)


CALLS = {name: (stage.ours, stage.shapes) for name, stage in STAGES.items()}
CALLS |= {
    "add_relu": (FF.add_relu, (IMAGE, IMAGE)),
    "batch_norm_relu": (lambda x, w, b: FF.batch_norm_relu(x, None, None, w, b, training=True), (IMAGE, (6,), (6,))),
    "batch_norm_relu_max_pool2d": (norm, (IMAGE, (6,), (6,))),
    "linear_relu_dropout": (lambda x, w: FF.linear_relu_dropout(x, w, p=0.0), ((5, 7), (4, 7))),
    "normalize": (lambda x: FF.normalize(x, 0.5, 0.25), (IMAGE,)),
}
each_call = pytest.mark.parametrize(("function", "shapes"), CALLS.values(), ids=CALLS)


def drawn(shapes):
    return [randn(*shape, seed=i) for i, shape in enumerate(shapes)]


def stock(function, tensors):
    with fastcnn.use_backend("torch"):
        return function(*tensors)


@each_call
def test_wrapper_runs_the_stock_layers(function, shapes):
    tensors = drawn(shapes)
    output = function(*map(Boxed, tensors))
    assert type(output) is Boxed
    assert torch.equal(output.held, stock(function, tensors))


@each_call
def test_wrapped_parameters_alone_run_the_stock_layers(function, shapes):
    image, *rest = drawn(shapes)
    if not rest:
        pytest.skip("takes no parameters")
    assert type(function(image, *map(Boxed, rest))) is Boxed


@each_call
def test_explicit_backend_refuses_a_wrapper(function, shapes):
    if function in (CALLS["normalize"][0], CALLS["linear_relu_dropout"][0]) and KERNELS[0] != "triton":
        pytest.skip("torch's operations run")
    with fastcnn.use_backend(KERNELS[0]), pytest.raises(RuntimeError, match="no rule for tensors of type Boxed"):
        function(*map(Boxed, drawn(shapes)))


@each_call
def test_subclass_that_sees_functions_stays_what_it_is(function, shapes):
    tensors = drawn(shapes)
    output = function(*(each.as_subclass(Named) for each in tensors))
    assert type(output) is Named
    assert torch.equal(output.as_subclass(torch.Tensor), stock(function, tensors))
    assert not any("fastcnn" in str(func) for func in Named.seen)


@each_call
@pytest.mark.parametrize("mode", [Functions, Operators])
def test_mode_sees_the_stock_layers(function, shapes, mode):
    with mode() as watching:
        output = function(*drawn(shapes))
    assert watching.seen
    assert not any("fastcnn" in str(func) for func in watching.seen)
    assert torch.equal(output, stock(function, drawn(shapes)))


def test_function_mode_sees_the_functions_of_the_layers():
    image, weight, bias = drawn(STAGES["conv2d_relu_max_pool2d"].shapes)
    with Functions() as watching:
        FF.conv2d_relu_max_pool2d(image, weight, bias, pool_size=2)
    names = [getattr(func, "__name__", "") for func in watching.seen]
    assert {"conv2d", "relu", "boolean_dispatch"} <= set(names) or {"conv2d", "relu", "max_pool2d"} <= set(names)


@each_stage
def test_default_device_is_no_mode_that_wants_to_see(stage):
    tensors = stage.tensors(requires_grad=False)
    with torch.device(DEVICE), torch.profiler.profile() as profile:
        stage.ours(*tensors)
    assert any("fastcnn::" in event.key for event in profile.key_averages())


@each_call
def test_functionalize(function, shapes):
    tensors = drawn(shapes)
    assert torch.equal(torch.func.functionalize(function)(*tensors), stock(function, tensors))
    traced = make_fx(torch.func.functionalize(function))(*tensors)
    assert torch.equal(traced(*tensors), stock(function, tensors))


@each_stage
def test_functionalize_of_gradients(stage):
    tensors = stage.tensors(requires_grad=False)
    gradient = torch.func.grad(loss_of(stage.ours))
    expected = stock(gradient, tensors)
    torch.testing.assert_close(torch.func.functionalize(gradient)(*tensors), expected)


def test_explicit_backend_refuses_functionalize():
    with fastcnn.use_backend(KERNELS[0]), pytest.raises(RuntimeError, match=r"no rule for torch\.func's transform"):
        torch.func.functionalize(lambda x: FF.max_pool2d(x, 2))(randn(*IMAGE))


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or os.name != "posix", reason="needs torch.distributed")
@each_call
def test_distributed_tensors(one_process, function, shapes):
    from torch.distributed.tensor import DTensor, Replicate, distribute_tensor, init_device_mesh

    if function is CALLS["linear_relu_dropout"][0]:
        pytest.skip("as linear_relu")
    mesh = init_device_mesh(DEVICE, (1,))
    tensors = [distribute_tensor(each, mesh, [Replicate()]) for each in drawn(shapes)]
    try:
        stock(function, tensors)
    except NotImplementedError as error:  # of pools and batch norms in torch 2.11
        pytest.skip(f"torch has no rule for the stock layers: {error}")
    output = function(*tensors)
    assert isinstance(output, DTensor)
    torch.testing.assert_close(output.to_local(), stock(function, drawn(shapes)))


def keeping_products(ctx, op, *args, **kwargs):
    kept = ("convolution.default", "addmm.default", "native_batch_norm.default", "_native_batch_norm_legit")
    keeps = any(name in str(op) for name in kept)
    return CheckpointPolicy.MUST_SAVE if keeps else CheckpointPolicy.PREFER_RECOMPUTE


@pytest.mark.parametrize(
    ("layers", "shape"),
    [
        ([nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.MaxPool2d(2)], (2, 3, 9, 9)),
        ([nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU()], (4, 8)),
        ([nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3)], (2, 3, 9, 9)),
    ],
    ids=["convolutions", "linear layers", "batch norm"],
)
def test_selective_checkpointing_of_layers_that_are_not_in_place(layers, shape):
    contexts = functools.partial(create_selective_checkpoint_contexts, keeping_products)
    network, image = nn.Sequential(*layers).to(DEVICE), randn(*shape)

    def gradients(network):
        network.zero_grad()
        checkpoint(network, image, use_reentrant=False, context_fn=contexts).square().mean().backward()
        return [each.grad.clone() for each in network.parameters()]

    expected = gradients(network)
    for actual, right in zip(gradients(fastcnn.fuse(network)), expected):
        torch.testing.assert_close(actual, right)


def test_kernels_still_run_without_anything_in_between():
    with kernels_in_float32(), fastcnn.use_backend("auto"), torch.profiler.profile() as profile:
        FF.max_pool2d(randn(*IMAGE), 2)
    assert any("fastcnn::max_pool" in event.key for event in profile.key_averages())


def test_in_place_relu_where_nobody_sees_it():
    with fastcnn.use_backend("torch"), torch.profiler.profile() as profile:
        FF.conv2d_relu(randn(*IMAGE), randn(4, 6, 3, 3))
    assert "aten::relu_" in {event.key for event in profile.key_averages()}
    with fastcnn.use_backend("torch"), Operators() as watching:
        FF.conv2d_relu(randn(*IMAGE), randn(4, 6, 3, 3))
    assert torch.ops.aten.relu.default in watching.seen
