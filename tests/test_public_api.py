"""The public names and signatures, what importing them imports, and the examples of their docstrings."""

import doctest
import importlib
import importlib.util
import inspect
import os
import pkgutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import fastcnn
import fastcnn.functional as FF
import fastcnn.nn

CONV = "input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1"
LRN = "input, size, alpha=0.0001, beta=0.75, k=1.0"
POOL = "*, pool_size, pool_stride=None, pool_padding=0, pool_ceil_mode=False"
BATCH_NORM = "input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-05"
FUNCTIONS = {
    "add_relu": "(input, other)",
    "batch_norm_relu": f"({BATCH_NORM})",
    "batch_norm_relu_max_pool2d": f"({BATCH_NORM}, {POOL})",
    "conv2d_relu": f"({CONV})",
    "conv2d_relu_max_pool2d": f"({CONV}, {POOL})",
    "linear_relu": "(input, weight, bias=None)",
    "linear_relu_dropout": "(input, weight, bias=None, p=0.5, training=True)",
    "local_response_norm": f"({LRN})",
    "local_response_norm_max_pool2d": f"({LRN}, {POOL})",
    "normalize": "(input, mean, std, dtype=None)",
    "max_pool2d": ("(input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False)"),
}
LAYERS = ["ConvReLU2d", "ConvReLUMaxPool2d", "LocalResponseNorm", "MaxPool2d", "Normalize", "Sequential"]
PRETRAINED = "(*, weights=None, progress=True, **kwargs)"
VGG = "(*, weights=None, progress=True, cifar=False, **kwargs)"
MODELS = {
    "AlexNet": "(num_classes=1000, dropout=0.5)",
    "AlexNet2012": "(num_classes=1000, *, lrn=True, dropout=0.5, groups=1, log_softmax=False)",
    "ConvNet": "(num_classes=7)",
    "MnistCNN": "(num_classes=10)",
    "ResNetCifar": "(num_classes=10)",
    "VGG": "(features, num_classes=1000, init_weights=True, dropout=0.5, *, cifar=False)",
    "alexnet": PRETRAINED,
    "resnet_cifar": "(num_classes=10)",
    "vgg11": VGG,
    "vgg11_bn": VGG,
    "vgg11_lrn": VGG,
    "vgg13": VGG,
    "vgg13_bn": VGG,
    "vgg16": VGG,
    "vgg16_1x1": VGG,
    "vgg16_bn": VGG,
    "vgg19": VGG,
    "vgg19_bn": VGG,
}
TOP = {
    "BackendStatus": "(available, reason='', build='')",
    "Explanation": "(rows)",
    "backends": "()",
    "explain": "(model, input=None)",
    "fuse": "(model)",
    "unfuse": "(model)",
    "use_backend": "(name, *, algorithm=None)",
    "warm_up": "(model, input)",
}
SIGNATURES = [(FF, FUNCTIONS), (fastcnn, MODELS), (fastcnn, TOP)]


def bare_signature(function):
    signature = inspect.signature(function)
    bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in signature.parameters.values()]
    return str(inspect.Signature(bare))


@pytest.mark.parametrize(
    ("module", "name", "signature"),
    [(module, name, signature) for module, table in SIGNATURES for name, signature in table.items()],
    ids=lambda value: value if isinstance(value, str) and value.isidentifier() else "",
)
def test_signature(module, name, signature):
    assert bare_signature(getattr(module, name)) == signature


@pytest.mark.parametrize("name", ["MaxPool2d", "LocalResponseNorm", "Sequential"])
def test_layers_take_what_torchs_take(name):
    assert bare_signature(getattr(fastcnn.nn, name)) == bare_signature(getattr(torch.nn, name))


def test_conv_layers_take_what_torchs_take():
    assert inspect.signature(fastcnn.nn.ConvReLU2d) == inspect.signature(torch.nn.Conv2d)
    assert bare_signature(fastcnn.nn.ConvReLUMaxPool2d) == f"(*args, {POOL.removeprefix('*, ')}, **kwargs)"


def test_argument_order_is_that_of_torch():
    assert bare_signature(FF.local_response_norm) == bare_signature(torch.nn.functional.local_response_norm)
    assert bare_signature(FF.batch_norm_relu) == bare_signature(torch.nn.functional.batch_norm)
    assert bare_signature(FF.max_pool2d) == bare_signature(torch.nn.functional._max_pool2d)


def test_all_lists_the_public_names():
    assert sorted(fastcnn.__all__) == sorted([*TOP, *MODELS, "functional", "models", "nn", "optim"])
    assert sorted(FF.__all__) == sorted(FUNCTIONS)
    assert sorted(fastcnn.nn.__all__) == sorted(LAYERS)
    assert sorted(fastcnn.models.__all__) == sorted(MODELS)


def test_nothing_else_is_public_at_the_top():
    names = {name for name, value in vars(fastcnn).items() if not isinstance(value, ModuleType)}
    assert {name for name in names if not name.startswith("_")} == {*TOP, *MODELS}


@pytest.mark.parametrize("module", [FF, fastcnn.nn], ids=lambda module: module.__name__)
def test_nothing_defined_in_a_module_is_public_unlisted(module):
    defined = {
        name for name, value in vars(module).items() if getattr(value, "__module__", "").startswith(module.__name__)
    }
    assert {name for name in defined if not name.startswith("_")} == set(module.__all__)


def test_version_is_that_of_the_distribution():
    assert isinstance(fastcnn.__version__, str)
    assert fastcnn.__version__[0].isdigit()


def python(code):
    """Run statements in a new process and return what they print."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("FASTCNN_", "TRITON_"))}
    environment["PYTHONPATH"] = str(Path(fastcnn.__file__).parents[1])
    process = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_importing_brings_in_torch_alone():
    printed = python(
        "import sys, torch; before = set(sys.modules)\n"
        "import fastcnn, fastcnn.functional, fastcnn.nn, fastcnn.models\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)\n"
        "kernels = [name for name in sys.modules if name.startswith('fastcnn.triton')]\n"
        "print(sorted(name for name in new if not name.startswith('_')), kernels)\n"
        "print([name for name in ('typer', 'rich', 'matplotlib', 'torchinfo', 'torchvision') if name in sys.modules])\n"
    )
    assert printed.splitlines() == ["['fastcnn'] []", "[]"]


def test_works_without_triton():
    printed = python(
        "import sys; sys.modules['triton'] = None\n"
        "import torch, fastcnn\n"
        "print(fastcnn.functional.max_pool2d(torch.ones(1, 1, 4, 4), 2).sum().item())\n"
        "print(fastcnn.MnistCNN()(torch.ones(1, 1, 28, 28)).shape[1])\n"
        "print(fastcnn.backends()['triton'].reason)\n"
        "try: fastcnn.use_backend('triton')\n"
        "except RuntimeError as error: print(error)\n"
    )
    four, ten, reason, error = printed.splitlines()
    assert (four, ten) == ("4.0", "10")
    assert "pip install triton" in reason
    assert reason in error


def documented():
    yield from ((fastcnn, name) for name in [*TOP, *MODELS])
    yield from ((FF, name) for name in FUNCTIONS)
    yield from ((fastcnn.nn, name) for name in LAYERS)
    yield fastcnn.optim, "SGD"


@pytest.mark.parametrize(("module", "name"), list(documented()), ids=lambda value: getattr(value, "__name__", value))
def test_docstring_has_an_example(module, name):
    assert ">>> " in (getattr(module, name).__doc__ or "")


def modules_with_examples():
    names = ["functional", "backend", "nn", "optim", "fuse", "explain", "models"]
    names = [f"fastcnn.{name}" for name in names]
    return [*names, *(f"fastcnn.models.{module.name}" for module in pkgutil.iter_modules(fastcnn.models.__path__))]


@pytest.mark.parametrize("name", modules_with_examples())
def test_examples_run(name):
    if name == "fastcnn.models.weights" and importlib.util.find_spec("torchvision") is None:
        pytest.skip("its example needs torchvision")
    # With no names but their own: an example runs where a reader pastes it.
    examples = doctest.DocTestFinder(exclude_empty=True).find(importlib.import_module(name), name, globs={})
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    with fastcnn.use_backend("auto"):
        for example in examples:
            runner.run(example)
    assert runner.summarize().failed == 0
