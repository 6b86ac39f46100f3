"""torch.compile around transforms of torch.func: the gradients are stock's, for every function, without a break."""

import copy

import pytest
import torch
from parity import COMPILED
from stages import DEVICE, assert_equal_but_rounding, loss_of, randn
from torch import nn

import fastcnn
import fastcnn.functional as FF

NORM = (3, 0.5, 0.75, 2.0)
IMAGE, WEIGHT = (2, 3, 5, 4), (4, 3, 2, 2)
FUNCTIONS = {
    "conv2d_relu": (FF.conv2d_relu, (IMAGE, WEIGHT, (4,))),
    "conv2d_relu_max_pool2d": (
        lambda x, w, b: FF.conv2d_relu_max_pool2d(x, w, b, padding=1, pool_size=2),
        (IMAGE, WEIGHT, (4,)),
    ),
    "max_pool2d": (lambda x: FF.max_pool2d(x, 2, 1), (IMAGE,)),
    "local_response_norm": (lambda x: FF.local_response_norm(x, *NORM), (IMAGE,)),
    "local_response_norm_max_pool2d": (
        lambda x: FF.local_response_norm_max_pool2d(x, *NORM, pool_size=2),
        (IMAGE,),
    ),
    "linear_relu": (FF.linear_relu, ((3, 5), (4, 5), (4,))),
    "add_relu": (lambda x, s: FF.add_relu(x, x * s), (IMAGE, (3, 1, 1))),
    "normalize": (lambda x: FF.normalize(x, 0.5, 0.25), (IMAGE,)),
}
# By the statistics of a batch: under torch.func by the stock layers alone.
NORMS = {
    "batch_norm_relu": (lambda x, w, b: FF.batch_norm_relu(x, None, None, w, b, training=True), (IMAGE, (3,), (3,))),
    "batch_norm_relu_max_pool2d": (
        lambda x, w, b: FF.batch_norm_relu_max_pool2d(x, None, None, w, b, training=True, pool_size=2),
        (IMAGE, (3,), (3,)),
    ),
}
TRANSFORMS = {
    "grad": lambda f, n: torch.func.grad(loss_of(f), tuple(range(n))),
    "grad of grad": lambda f, n: torch.func.grad(lambda *t: torch.func.grad(loss_of(f))(*t).square().sum()),
    "vjp": lambda f, n: lambda *t: (lambda output, pull: pull(output.detach().cos()))(*torch.func.vjp(f, *t)),
    "jacrev": lambda f, n: torch.func.jacrev(f),
    "per sample": lambda f, n: torch.vmap(torch.func.grad(loss_of(f), tuple(range(n))), (0, *[None] * (n - 1))),
}


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()


def assert_compiles(function, shapes, transform, compiler="aot_eager"):
    tensors = [randn(*shape, seed=i) for i, shape in enumerate(shapes)]
    if transform == "per sample":
        tensors[0] = tensors[0][:, None]
    with fastcnn.use_backend("torch"):
        expected = TRANSFORMS[transform](function, len(tensors))(*tensors)
    compiled = torch.compile(TRANSFORMS[transform](function, len(tensors)), backend=compiler, fullgraph=True)
    assert_equal_but_rounding(compiled(*tensors), expected)


def pairs(names, all_transforms):
    """Give each function the transforms that matter most, and a few of them all."""
    return [(name, each) for name in names for each in TRANSFORMS if each in MOST or name in all_transforms]


MOST = ("grad", "per sample")


@pytest.mark.parametrize(("name", "transform"), pairs(FUNCTIONS, ("conv2d_relu_max_pool2d", "local_response_norm")))
@pytest.mark.parametrize("backend", ["triton", *(name for name, _ in COMPILED)])
def test_kernels(backend, name, transform):
    if name == "normalize" and backend != "triton":
        pytest.skip("torch's operations run")
    with fastcnn.use_backend(backend):
        assert_compiles(*FUNCTIONS[name], transform)


@pytest.mark.parametrize(("name", "transform"), pairs([*FUNCTIONS, *NORMS], ("local_response_norm",)))
def test_auto(name, transform):
    assert_compiles(*(FUNCTIONS | NORMS)[name], transform)


@pytest.mark.parametrize(
    ("transform", "compiler"),
    [
        ("grad", "eager"),
        ("per sample", "eager"),
        ("per sample", "inductor"),
        pytest.param("grad", "inductor", marks=pytest.mark.sweep),
    ],
)
def test_other_compilers(compiler, transform):
    backend = COMPILED[0][0] if COMPILED else "triton"
    with fastcnn.use_backend(backend):
        assert_compiles(
            lambda x, w, b: FF.local_response_norm_max_pool2d(FF.conv2d_relu(x, w, b), *NORM, pool_size=2),
            (IMAGE, WEIGHT, (4,)),
            transform,
            compiler,
        )


def test_network_by_functional_call():
    model = fastcnn.MnistCNN().to(DEVICE).eval()
    stock = fastcnn.unfuse(copy.deepcopy(model))
    images, classes = randn(16, 1, 28, 28), torch.arange(16, device=DEVICE) % 10
    parameters = {name: each.detach() for name, each in model.named_parameters()}

    def gradients(network):
        def loss(parameters):
            outputs = torch.func.functional_call(network, parameters, (images,))
            return nn.functional.cross_entropy(outputs, classes)

        return torch.func.grad(loss)

    compiled = torch.compile(gradients(model), backend="aot_eager", fullgraph=True)
    assert_equal_but_rounding(compiled(parameters), gradients(stock)(parameters))


def test_per_sample_gradients_of_a_network():
    layers = nn.Conv2d(3, 4, 3), nn.LocalResponseNorm(5), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(4 * 9, 2)
    model = fastcnn.nn.Sequential(*layers).to(DEVICE)
    stock = nn.Sequential(*copy.deepcopy(layers)).to(DEVICE)
    parameters = {name: each.detach() for name, each in model.named_parameters()}

    def per_sample(network):
        def loss(parameters, image):
            return torch.func.functional_call(network, parameters, (image[None],)).square().sum()

        return torch.func.vmap(torch.func.grad(loss), (None, 0))

    images = randn(3, 3, 8, 8)
    compiled = torch.compile(per_sample(model), backend="aot_eager")
    assert_equal_but_rounding(compiled(parameters, images), per_sample(stock)(parameters, images))


def test_outer_gradients_go_through_a_compiled_transform():
    image = randn(*IMAGE).requires_grad_()

    def penalty(x):
        return torch.func.grad(loss_of(lambda x: FF.local_response_norm(x, *NORM)))(x).square().sum()

    (actual,) = torch.autograd.grad(torch.compile(penalty, backend="aot_eager")(image), image)
    with fastcnn.use_backend("torch"):
        (expected,) = torch.autograd.grad(penalty(image), image)
    assert_equal_but_rounding(actual, expected)
