"""torchvision's classification networks compute and train the same after fuse.

`make test` runs one of each family; FASTCNN_ZOO=1 runs the whole zoo (`make zoo`).
"""

import copy
import os

import pytest
import torch

import fastcnn

models = pytest.importorskip("torchvision.models")

FAMILIES = (
    "convnext_tiny",
    "densenet121",
    "efficientnet_b0",
    "googlenet",
    "inception_v3",
    "mnasnet0_5",
    "mobilenet_v3_small",
    "regnet_y_400mf",
    "resnet18",
    "shufflenet_v2_x0_5",
    "squeezenet1_1",
)
ZOO = models.list_models(module=models) if os.environ.get("FASTCNN_ZOO") == "1" else FAMILIES
SIZES = {"inception_v3": 299, "maxvit_t": 224, "vit_h_14": 56}  # Inception's auxiliary classifier takes 299 alone
each_network = pytest.mark.parametrize("name", ZOO)


def built(name):
    torch.manual_seed(0)
    size = SIZES.get(name, 64)
    settings = {"image_size": size} if name.startswith("vit") else {}
    if name in ("googlenet", "inception_v3"):
        settings["init_weights"] = False  # theirs takes scipy seconds
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


def distance(actual, exact):
    return sum((a.double() - e.double()).square().sum() for a, e in zip(actual, exact, strict=True)).sqrt().item()


@each_network
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


@each_network
def test_is_as_exact_as_before_through_kernels(name):
    model, x = built(name)
    if name == "inception_v3":
        x = x[..., :96, :96]  # in eval its auxiliary classifier does not run
    model.eval()
    fused = fastcnn.fuse(model)
    with torch.no_grad():
        folded_in_eval = tensors(fused(x))
    plain, exact = output_and_gradients(model, x), output_and_gradients(copy.deepcopy(model).double(), x.double())
    allowed = 2 * distance(plain, exact) + torch.finfo(torch.float32).eps * distance(exact, [0 * e for e in exact])
    with fastcnn.use_backend("cpu"):
        assert distance(output_and_gradients(fused, x), exact) <= allowed
    assert distance(output_and_gradients(fused, x), exact) <= allowed
    count = len(folded_in_eval)
    assert distance(folded_in_eval, exact[:count]) <= allowed
