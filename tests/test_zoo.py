"""torchvision's classification networks compute and train the same after fuse.

`make test-all` runs one of each family; FASTCNN_ZOO=1 runs the whole zoo (`make zoo`).
"""

import copy
import os

import parity
import pytest
import torch

import fastcnn

models = pytest.importorskip("torchvision.models")

FAMILIES = (
    *("googlenet", "densenet121", "mobilenet_v3_small", "squeezenet1_1"),
    *("resnet18", "inception_v3", "efficientnet_b0", "regnet_y_400mf", "shufflenet_v2_x0_5"),
)
WITH_KERNELS = ("googlenet", "squeezenet1_1", "inception_v3", "resnet18")
WHOLE = os.environ.get("FASTCNN_ZOO") == "1"
ZOO = models.list_models(module=models)
SIZES = {"inception_v3": 299 if WHOLE else 96, "maxvit_t": 224, "vit_h_14": 56}
# Inception's auxiliary classifier takes images of 299 alone.
SETTINGS = {"googlenet": {"init_weights": False}, "inception_v3": {"init_weights": False, "aux_logits": WHOLE}}


def built(name):
    torch.manual_seed(0)
    size = SIZES.get(name, 64 if WHOLE else 48)
    settings = {"image_size": size} if name.startswith("vit") else SETTINGS.get(name, {})
    model = models.get_model(name, weights=None, num_classes=10, **settings)
    return model, torch.randn(2, 3, size, size)


def tensors(output):
    return [each for each in output if each is not None] if isinstance(output, tuple) else [output]


def output_and_gradients(model, x):
    """Outputs, then the gradients of the input and of every parameter that has one; dropout is the same each time."""
    torch.manual_seed(1)
    model.zero_grad()
    x = x.clone().requires_grad_()
    outputs = tensors(model(x))
    sum(output.square().sum() for output in outputs).backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return [*(output.detach() for output in outputs), x.grad, *gradients]


def assert_equal(actual, expected):
    assert len(actual) == len(expected)
    assert all(map(torch.equal, actual, expected))


def assert_as_exact(actual, plain, exact):
    """Assert that all tensors together are at most twice as far off as stock's, and a last place of the whole."""
    last_place = torch.finfo(torch.float32).eps * distance(exact, [torch.zeros(())] * len(exact))
    assert distance(actual, exact) <= 2 * distance(plain, exact) + last_place


def distance(actual, exact):
    return sum((a.double() - e.double()).square().sum() for a, e in zip(actual, exact, strict=True)).sqrt().item()


@pytest.mark.parametrize("name", ZOO if WHOLE else parity.mostly_sweep(FAMILIES, 4))
def test_trains_as_before_to_the_last_bit_on_stock_layers(name):
    model, x = built(name)
    state = copy.deepcopy(model.state_dict())
    expected = output_and_gradients(model, x)
    buffers = [buffer.clone() for buffer in model.buffers()]
    model.load_state_dict(state)
    fused = fastcnn.fuse(model)
    with fastcnn.use_backend("torch"):
        assert_equal(output_and_gradients(fused, x), expected)
    assert_equal(list(model.buffers()), buffers)


@pytest.mark.parametrize("name", ZOO if WHOLE else parity.mostly_sweep(WITH_KERNELS))
def test_is_as_exact_as_before_through_kernels(name):
    model, x = built(name)
    model.eval()
    plain, exact = output_and_gradients(model, x), output_and_gradients(copy.deepcopy(model).double(), x.double())
    fused = fastcnn.fuse(model)
    with torch.no_grad():
        folded = tensors(fused(x))
    count = len(folded)
    assert_as_exact(folded, plain[:count], exact[:count])
    for backend in ("cpu", "auto"):
        with fastcnn.use_backend(backend):
            assert_as_exact(output_and_gradients(fused, x), plain, exact)
