"""torch.compile, torch.export and the operators themselves: schemas, fake kernels, strides."""

import functools
import shutil
from pathlib import Path

import pytest
import torch
from parity import COMPILED, assert_within_twice, mostly_sweep
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._functorch.aot_autograd import make_boxed_func
from torch._subclasses.fake_tensor import FakeTensorMode

import fastcnn
import fastcnn.functional as FF

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    with fastcnn.use_backend("triton"):
        yield


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


NORM = (3, 0.5, 0.75, 2.0)
IMAGE, WEIGHT, BIAS = (2, 6, 9, 7), (4, 6, 3, 3), (4,)

# A function, the shapes of the tensors that it is called on, and the operators of its graphs, forward and backward.


def running(image):
    """Return running statistics, new at each call."""
    return torch.zeros_like(image[0, :, 0, 0]), torch.ones_like(image[0, :, 0, 0])


STAGES = {
    "conv2d_relu": (
        lambda x, w, b: FF.conv2d_relu(x, w, b, stride=2, padding=1),
        (IMAGE, WEIGHT, BIAS),
        ("conv_relu", "conv_relu_backward"),
    ),
    "conv2d_relu padding same": (
        lambda x, w: FF.conv2d_relu(x, w, padding="same"),
        (IMAGE, (4, 6, 2, 4)),
        ("conv_relu", "conv_relu_backward"),
    ),
    "conv2d_relu_max_pool2d": (
        lambda x, w, b: FF.conv2d_relu_max_pool2d(x, w, b, padding=1, pool_size=3, pool_stride=2),
        (IMAGE, WEIGHT, BIAS),
        ("conv_relu_pool_codes", "conv_relu_pool_backward"),
    ),
    "max_pool2d": (lambda x: FF.max_pool2d(x, 3, 2, 1), (IMAGE,), ("max_pool_codes", "max_pool_backward")),
    "max_pool2d unbatched": (lambda x: FF.max_pool2d(x, 2), (IMAGE[1:],), ("max_pool_codes", "max_pool_backward")),
    "local_response_norm": (lambda x: FF.local_response_norm(x, *NORM), (IMAGE,), ("lrn", "lrn_backward")),
    "local_response_norm_max_pool2d": (
        lambda x: FF.local_response_norm_max_pool2d(x, *NORM, pool_size=2),
        (IMAGE,),
        ("lrn_pool_codes", "lrn_pool_backward"),
    ),
    "batch_norm_relu": (
        lambda x, w, b: FF.batch_norm_relu(x, *running(x), w, b),
        (IMAGE, IMAGE[1:2], IMAGE[1:2]),
        ("bn_relu", "bn_relu_backward"),
    ),
    "batch_norm_relu_max_pool2d": (
        lambda x, w, b: FF.batch_norm_relu_max_pool2d(x, *running(x), w, b, pool_size=2),
        (IMAGE, IMAGE[1:2], IMAGE[1:2]),
        ("bn_relu_pool_codes", "bn_relu_pool_backward"),
    ),
    "add_relu": (lambda x, s: FF.add_relu(x, x * s), (IMAGE, (6, 1, 1)), ("add_relu", "add_relu_backward")),
    "linear_relu": (FF.linear_relu, ((5, 7), (4, 7), BIAS), ("linear_relu", "linear_relu_backward")),
}
each_stage = pytest.mark.parametrize(("function", "shapes", "operators"), STAGES.values(), ids=STAGES)


def tensors_of(shapes, dtype=torch.float32):
    return [randn(*shape, seed=i).to(dtype).requires_grad_() for i, shape in enumerate(shapes)]


def run(function, shapes, dtype=torch.float32):
    tensors = tensors_of(shapes, dtype)
    output = function(*tensors)
    return output, torch.autograd.grad(output.square().sum(), tensors)


def assert_parity_with_stock(ours, stock, function, shapes):
    """Assert the twice-torch rule for what `run` returned, by our kernels and by the stock layers."""
    with fastcnn.use_backend("torch"):
        exact = run(function, shapes, torch.float64)
    for mine, theirs, truth in zip(*map(torch.utils._pytree.tree_leaves, (ours, stock, exact)), strict=True):
        assert_within_twice(mine, theirs, truth)


class Graphs:
    """A backend that runs graphs as they are and notes which operators forward and backward hold."""

    def __init__(self):
        self.forward, self.backward = [], []
        self.backend = aot_autograd(fw_compiler=noting(self.forward), bw_compiler=noting(self.backward))

    def ours(self):
        return {name for name in (*self.forward, *self.backward) if name.startswith("fastcnn.")}


def noting(operators):
    def compile(graph, _example_inputs):
        operators.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return make_boxed_func(graph.forward)

    return compile


@each_stage
@pytest.mark.parametrize("backend", ["triton", "auto", *(name for name, _ in COMPILED)])
def test_compiled_without_a_break_equals_eager_with_gradients(backend, function, shapes, operators):
    with fastcnn.use_backend(backend):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(run(compiled, shapes), run(function, shapes))


@each_stage
def test_graphs_hold_the_kernels_operators(function, shapes, operators):
    graphs = Graphs()
    run(torch.compile(function, fullgraph=True, backend=graphs.backend), shapes)
    forward, backward = (f"fastcnn.{name}.triton" for name in operators)
    assert forward in graphs.forward
    assert backward in graphs.backward


@each_stage
def test_graph_without_gradients_holds_no_codes(function, shapes, operators):
    graphs = Graphs()
    with torch.no_grad():
        torch.compile(function, fullgraph=True, backend=graphs.backend)(*tensors_of(shapes))
    assert graphs.ours() == {f"fastcnn.{operators[0].removesuffix('_codes')}.triton"}


@each_stage
def test_backend_changed_after_compiling_counts(function, shapes, operators):
    graphs = Graphs()
    compiled = torch.compile(function, fullgraph=True, backend=graphs.backend)
    with fastcnn.use_backend("torch"):
        stock = run(compiled, shapes)
        assert graphs.ours() == set()
    fused = run(compiled, shapes)
    assert graphs.ours() == {f"fastcnn.{name}.triton" for name in operators}
    assert_parity_with_stock(fused, stock, function, shapes)


def test_algorithm_changed_after_compiling_counts():
    algorithms = []

    def backend(graph, _example_inputs):
        algorithms.extend(
            "implicit_gemm" in node.args for node in graph.graph.nodes if str(node.target).startswith("fastcnn.")
        )
        return graph

    compiled = torch.compile(FF.conv2d_relu, fullgraph=True, backend=backend)
    with torch.no_grad():
        compiled(randn(*IMAGE), randn(*WEIGHT))
        with fastcnn.use_backend("triton", algorithm="implicit_gemm"):
            compiled(randn(*IMAGE), randn(*WEIGHT))
    assert algorithms == [False, True]


@pytest.mark.parametrize("name", [name for name in STAGES if "unbatched" not in name])
def test_dynamic_batch_compiles_once(name):
    function, shapes, _ = STAGES[name]
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    image, *rest = tensors_of(shapes)
    for batch in (image[:2], torch.cat([image, image[:1]])):
        tensors = [batch.detach().requires_grad_(), *rest]
        torch._dynamo.mark_dynamic(tensors[0], 0)
        actual, expected = compiled(*tensors), function(*tensors)
        torch.testing.assert_close(actual, expected)
        actual, expected = (torch.autograd.grad(output.sum(), tensors) for output in (actual, expected))
        torch.testing.assert_close(actual, expected)
    assert counter.frame_count == 1


def test_dynamic_shapes():
    def features(x, w, b):
        x = FF.conv2d_relu_max_pool2d(x, w, b, padding=1, pool_size=3, pool_stride=2)
        return FF.local_response_norm_max_pool2d(x, *NORM, pool_size=2)

    compiled = torch.compile(features, fullgraph=True, backend="aot_eager", dynamic=True)
    for shape in (IMAGE, (3, 6, 11, 8)):
        shapes = (shape, WEIGHT, BIAS)
        torch.testing.assert_close(run(compiled, shapes), run(features, shapes))


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="inductor needs a C++ compiler")
def test_inductor():
    def network(x, w, b, v):
        x = FF.conv2d_relu_max_pool2d(x * 2, w, b, padding=1, pool_size=3, pool_stride=2)
        x = FF.local_response_norm_max_pool2d(x, *NORM, pool_size=2)
        return FF.linear_relu(FF.max_pool2d(x, (2, 1)).flatten(1), v) + 1

    shapes = (IMAGE, WEIGHT, BIAS, (3, 4))
    compiled = torch.compile(network, fullgraph=True)
    with fastcnn.use_backend("torch"):
        stock = run(network, shapes)
    assert_parity_with_stock(run(compiled, shapes), stock, network, shapes)


def test_compiled_channels_last_equals_eager_with_strides():
    def function(x, w):
        return FF.max_pool2d(FF.conv2d_relu(x, w), 2)

    image = randn(*IMAGE).to(memory_format=torch.channels_last)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    actual, expected = compiled(image, randn(*WEIGHT)), function(image, randn(*WEIGHT))
    torch.testing.assert_close(actual, expected)
    assert actual.stride() == expected.stride()


@pytest.mark.parametrize("strict", [False, True])
def test_exported_program_holds_the_operators(strict):
    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(6, 4, 3, device=DEVICE)

        def forward(self, x):
            x = FF.conv2d_relu_max_pool2d(x, self.conv.weight, self.conv.bias, pool_size=2)
            return FF.local_response_norm(x, *NORM)

    network = Network().eval()
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    exported = torch.export.export(network, (randn(*IMAGE),), strict=strict)
    operators = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
    assert operators == {"fastcnn.conv_relu_pool.triton", "fastcnn.lrn.triton"}
    torch.testing.assert_close(exported.module()(randn(*IMAGE)), network(randn(*IMAGE)))


# Arguments of every operator, its tensors made in one layout. A backward is given what its forward returns.

CONV = [1, 1, 1, 1, 1, 1, 1]
POOL, PIXELWISE = [3, 2, 2, 2, 1, 0, 1, 1, 0], [1, 1, 1, 1, 0, 0, 1, 1, 0]
LAYOUTS = {
    "contiguous": lambda tensor: tensor,
    "channels_last": lambda tensor: tensor.to(memory_format=torch.channels_last),
    "sliced": lambda tensor: torch.cat([tensor, tensor], -1)[..., ::2],
    "expanded": lambda tensor: tensor[:1].expand(tensor.shape),
    "transposed": lambda tensor: tensor.transpose(-1, -2).contiguous().transpose(-1, -2),
    "no images": lambda tensor: tensor[:0],
    "one channel": lambda tensor: tensor[:, :1],
    "one pixel": lambda tensor: tensor[:, :, :1, :1],
}


KERNEL_BACKENDS = ("triton", "cuda", "cpu")


def op(name, backend="triton"):
    return getattr(getattr(torch.ops.fastcnn, name), backend)


@functools.cache
def calls(layout, with_bias=True, algorithm=None):
    """Return the arguments of every operator for one image in a layout."""
    image, bias = LAYOUTS[layout](randn(2, 3, 5, 4)), randn(4) if with_bias else None
    conv = (image, randn(4, image.shape[1], 1, 1), bias, CONV, algorithm)
    window = POOL if min(image.shape[2:]) > 1 else PIXELWISE
    output = op("conv_relu")(*conv)
    conv_codes = op("conv_relu_pool_codes")(*conv, window)[1]
    codes, lrn_codes = op("max_pool_codes")(image, window)[1], op("lrn_pool_codes")(image, *NORM, window)[1]
    statistics = op("bn_relu_statistics")(image)
    parameters = (randn(image.shape[1]), randn(image.shape[1])) if with_bias else (None, None)
    norm = (statistics[0], statistics[1], *parameters, 1e-5)
    bn_codes = op("bn_relu_pool_codes")(image, *norm, window)[1]
    rows, matrix = image.flatten(0, 2), randn(4, image.shape[-1])
    linear = op("linear_relu")(rows, matrix, bias)
    mean = torch.ones(image.shape[1], device=DEVICE)

    def grad(of):
        return torch.ones_like(of, dtype=torch.float32)

    return {
        "conv_relu": conv,
        "conv_relu_backward": (grad(output), output, bias is not None),
        "conv_relu_pool": (*conv, window),
        "conv_relu_pool_codes": (*conv, window),
        "conv_relu_pool_backward": (grad(conv_codes), conv_codes, *output.shape[2:], bias is not None, window),
        "max_pool": (image, window),
        "max_pool_codes": (image, window),
        "max_pool_backward": (grad(codes), codes, *image.shape[2:], window),
        "lrn": (image, *NORM),
        "lrn_backward": (grad(image), image, *NORM),
        "lrn_pool": (image, *NORM, window),
        "lrn_pool_codes": (image, *NORM, window),
        "lrn_pool_backward": (grad(lrn_codes), lrn_codes, image, *NORM, window),
        "bn_relu_statistics": (image,),
        "bn_relu": (image, *norm),
        "bn_relu_backward": (grad(image), image, *norm, with_bias),
        "bn_relu_pool": (image, *norm, window),
        "bn_relu_pool_codes": (image, *norm, window),
        "bn_relu_pool_backward": (grad(bn_codes), bn_codes, image, *norm, with_bias, window),
        "add_relu": (image, image),
        "add_relu_backward": (grad(image), image),
        "linear_relu": (rows, matrix, bias),
        "linear_relu_backward": (grad(linear), linear, bias is not None),
        "linear_relu_dropout": (rows, matrix, bias, torch.tensor([3], device=DEVICE), 0.5),
        "linear_relu_dropout_backward": (grad(linear), linear, 0.5, bias is not None),
        "dgrad": (grad(output), output, *conv[:2], True, with_bias, None, CONV, []),
        "wgrad": (grad(output), output, *conv[:2], with_bias, None, CONV, []),
        "normalize": (image, mean, mean, torch.float32),
        "normalize_conv_relu": (image, mean, mean, *conv[1:4], "packed"),
        "normalize_conv_relu_pool": (image, mean, mean, *conv[1:4], "packed", window),
        "normalize_conv_relu_pool_codes": (image, mean, mean, *conv[1:4], "packed", window),
    }


OPERATORS = (
    *("conv_relu", "conv_relu_backward"),
    *("conv_relu_pool", "conv_relu_pool_codes", "conv_relu_pool_backward"),
    *("max_pool", "max_pool_codes", "max_pool_backward"),
    *("lrn", "lrn_backward"),
    *("lrn_pool", "lrn_pool_codes", "lrn_pool_backward"),
    *("linear_relu", "linear_relu_backward"),
    *("bn_relu", "bn_relu_statistics", "bn_relu_backward"),
    *("bn_relu_pool", "bn_relu_pool_codes", "bn_relu_pool_backward"),
    *("add_relu", "add_relu_backward"),
)
ONLY_TRITON = (
    *("dgrad", "wgrad", "linear_relu_dropout", "linear_relu_dropout_backward", "normalize"),
    *("normalize_conv_relu", "normalize_conv_relu_pool", "normalize_conv_relu_pool_codes"),
)
each_operator = pytest.mark.parametrize(
    ("name", "backend"),
    [(name, backend) for name in OPERATORS for backend in ("triton", *(name for name, _ in COMPILED))]
    + [(name, "triton") for name in ONLY_TRITON],
)


def test_every_operator_is_listed_here():
    registered = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("fastcnn::")}
    everywhere = {f"fastcnn::{name}.{backend}" for name in OPERATORS for backend in KERNEL_BACKENDS}
    assert registered == everywhere | {f"fastcnn::{name}.triton" for name in ONLY_TRITON}


def test_schemas_stay_as_they_are():
    """An exported program, and a compiled extension, hold them."""
    names = sorted(name for name in torch._C._dispatch_get_all_op_names() if name.startswith("fastcnn::"))
    schemas = [str(op(*name.removeprefix("fastcnn::").split("."))._schema) for name in names]
    assert schemas == Path(__file__).with_name("schemas.txt").read_text().splitlines()


@pytest.mark.skipif(not COMPILED, reason="no compiled kernels here")
def test_compiled_operator_counts_the_numbers_of_a_window():
    with pytest.raises(RuntimeError, match="expected 9 numbers, got 4"):
        op("max_pool", COMPILED[0][0])(randn(*IMAGE), [2, 2, 2, 2])


@each_operator
@pytest.mark.parametrize(
    ("layout", "with_bias"),
    [pytest.param("contiguous", False, marks=pytest.mark.sweep), ("channels_last", True)],
    ids=["contiguous", "channels_last, bias"],
)
def test_opcheck(layout, with_bias, name, backend):
    # Every test of opcheck's: that of the autograd registration is for inputs that require a gradient, which these
    # operators never see, as the autograd Functions call them.
    torch.library.opcheck(op(name, backend), calls(layout, with_bias)[name])


def laid_out(tensor):
    return tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device, tensor.storage_offset()


@each_operator
@pytest.mark.parametrize("layout", mostly_sweep(LAYOUTS, 5))
def test_fake_outputs_are_laid_out_as_the_real_ones(layout, name, backend):
    arguments = calls(layout)[name]
    real = torch.utils._pytree.tree_leaves(op(name, backend)(*arguments))
    with FakeTensorMode() as mode:
        as_fake = torch.utils._pytree.tree_map_only(torch.Tensor, mode.from_tensor, arguments)
        fake = torch.utils._pytree.tree_leaves(op(name, backend)(*as_fake))
    assert [laid_out(tensor) for tensor in fake] == [laid_out(tensor) for tensor in real]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_implicit_gemm_lays_its_output_out_as_the_fake(layout):
    arguments = calls(layout, algorithm="implicit_gemm")["conv_relu"]
    with FakeTensorMode() as mode:
        fake = op("conv_relu")(*torch.utils._pytree.tree_map_only(torch.Tensor, mode.from_tensor, arguments))
    assert laid_out(fake) == laid_out(op("conv_relu")(*arguments))
