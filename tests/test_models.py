"""The models: parameter counts, layer tables, torchvision's keys and weights, checkpoints, builders."""

import sys

import pytest
import torch
from torch import nn

import fastcnn
from fastcnn.models import MODELS

PARAMETERS = {
    "AlexNet": (fastcnn.AlexNet, 61_100_840),
    "AlexNet2012": (fastcnn.AlexNet2012, 62_378_344),
    "AlexNet2012 groups=2": (lambda: fastcnn.AlexNet2012(groups=2), 60_965_224),
    "AlexNet2012 lrn=False": (lambda: fastcnn.AlexNet2012(lrn=False), 62_378_344),
    "VGG-11": (fastcnn.vgg11, 132_863_336),
    "VGG-11 LRN": (fastcnn.vgg11_lrn, 132_863_336),
    "VGG-13": (fastcnn.vgg13, 133_047_848),
    "VGG-16": (fastcnn.vgg16, 138_357_544),
    "VGG-16 1x1": (fastcnn.vgg16_1x1, 133_638_952),
    "VGG-16 BN": (fastcnn.vgg16_bn, 138_365_992),
    "VGG-19": (fastcnn.vgg19, 143_667_240),
    "VGG-16 CIFAR": (lambda: fastcnn.vgg16(cifar=True), 15_245_130),
    "MnistCNN": (fastcnn.MnistCNN, 333_526),
    "ConvNet": (fastcnn.ConvNet, 117_991),
    "ResNetCifar": (fastcnn.ResNetCifar, 175_258),
}


def parameter_count(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("model", PARAMETERS)
def test_parameter_count(model):
    build, expected = PARAMETERS[model]
    with torch.device("meta"):
        assert parameter_count(build()) == expected


@pytest.mark.parametrize("name", MODELS)
def test_registered_model_scores_its_input_size(name):
    entry = MODELS[name]
    with torch.device("meta"):
        assert entry.build(num_classes=3)(torch.empty(2, *entry.input_size)).shape == (2, 3)


def test_96_channel_alexnet_layer_by_layer():
    with torch.device("meta"):
        model = fastcnn.AlexNet2012(lrn=False)
        x = torch.empty(1, 3, 227, 227)
        rows = []
        for layer in model.features:
            x = layer(x)
            if isinstance(layer, nn.Conv2d):
                rows.append((tuple(x.shape[1:]), parameter_count(layer)))
    assert rows == [
        ((96, 55, 55), 34_944),
        ((256, 27, 27), 614_656),
        ((384, 13, 13), 885_120),
        ((384, 13, 13), 1_327_488),
        ((256, 13, 13), 884_992),
    ]


def test_alexnet_2012_normalizes_after_the_first_two_relus():
    with torch.device("meta"):
        model = fastcnn.AlexNet2012()
    norms = [index for index, layer in enumerate(model.features) if isinstance(layer, nn.LocalResponseNorm)]
    assert norms == [2, 6]
    assert all(isinstance(model.features[index - 1], nn.ReLU) for index in norms)
    assert model.features[2].extra_repr() == "5, alpha=0.0001, beta=0.75, k=2.0"


@pytest.fixture(scope="module")
def alexnet_2012():
    torch.manual_seed(0)
    return fastcnn.AlexNet2012(num_classes=10, dropout=0.0, log_softmax=True)


def test_alexnet_2012_starts_from_the_papers_weights(alexnet_2012):
    layers = [layer for layer in alexnet_2012.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    assert [layer.bias.unique().tolist() for layer in layers] == [[0], [1], [0], [1], [1], [0], [0], [0]]
    for layer in layers:
        assert layer.weight.std().item() == pytest.approx(0.01, rel=0.05)
        assert layer.weight.mean().item() == pytest.approx(0.0, abs=1e-3)


def test_alexnet_2012_gives_log_probabilities(alexnet_2012):
    x = torch.randn(2, 3, 227, 227)
    scores = alexnet_2012(x)
    torch.testing.assert_close(scores.exp().sum(1), torch.ones(2))
    torch.testing.assert_close(scores, fastcnn.unfuse(alexnet_2012)(x))


def net_keys(state):
    """`features.<i>.*` as `net.<i>.*`, beside `classifier.*`."""
    return {name.replace("features.", "net."): value for name, value in state.items()}


def net_prefix(state):
    """Everything below `net.`."""
    return {f"net.{name}": value for name, value in state.items()}


@pytest.mark.parametrize("renamed", [net_keys, net_prefix])
@pytest.mark.parametrize("parent", [lambda model: model, lambda model: nn.ModuleDict({"backbone": model})])
def test_alexnet_2012_loads_checkpoints_below_net(renamed, parent):
    with torch.device("meta"):
        model = parent(fastcnn.AlexNet2012(num_classes=10))
        names = list(model.state_dict())
        path = names[0].removesuffix("features.0.weight")
        state = {name.removeprefix(path): nn.Parameter(value) for name, value in model.state_dict().items()}
    checkpoint = {path + name: value for name, value in renamed(state).items()}
    assert list(checkpoint) != names
    model.load_state_dict(checkpoint, strict=True, assign=True)
    loaded = dict(model.named_parameters())
    assert list(loaded) == names
    assert all(loaded[path + name] is value for name, value in state.items())


def test_alexnet_2012_refuses_other_keys():
    with torch.device("meta"):
        model = fastcnn.AlexNet2012(num_classes=10)
    state = model.state_dict()
    with pytest.raises(RuntimeError, match=r"Unexpected key.*net\.0\.weight"):
        model.load_state_dict({**state, "net.0.weight": state["features.0.weight"]}, assign=True)
    with pytest.raises(RuntimeError, match=r"Missing key.*features\.0\.weight"):
        model.load_state_dict({name: value for name, value in state.items() if name != "features.0.weight"})


def output_and_gradients(model, x):
    y = model(x)
    y.square().sum().backward()
    return [y, *(parameter.grad for parameter in model.parameters())]


SMALL_MODELS = {
    "MnistCNN": (fastcnn.MnistCNN, (4, 1, 28, 28)),
    "ConvNet": (fastcnn.ConvNet, (2, 3, 224, 224)),
    "VGG-11 LRN": (lambda: fastcnn.vgg11_lrn(cifar=True, dropout=0.0), (2, 3, 32, 32)),
    "VGG-16 1x1": (lambda: fastcnn.vgg16_1x1(cifar=True, dropout=0.0), (2, 3, 32, 32)),
    "VGG-11 BN": (lambda: fastcnn.vgg11_bn(cifar=True, dropout=0.0), (2, 3, 32, 32)),
}


@pytest.mark.parametrize("model", SMALL_MODELS)
def test_outputs_and_gradients_equal_the_unfused_model(model):
    build, shape = SMALL_MODELS[model]
    fused = build()
    x = torch.randn(shape)
    actual = output_and_gradients(fused, x)
    fused.zero_grad()
    for a, b in zip(actual, output_and_gradients(fastcnn.unfuse(fused), x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_children_of_the_small_models():
    assert [name for name, _ in fastcnn.MnistCNN().named_children()] == ["layer1", "layer2", "fc"]
    assert fastcnn.MnistCNN().fc[0].in_features == 3136
    assert fastcnn.ConvNet().fc.in_features == 1600


def test_cifar_vgg_takes_32_by_32_images():
    model = fastcnn.vgg11(cifar=True)
    assert [layer.out_features for layer in model.classifier if isinstance(layer, nn.Linear)] == [512, 512, 10]
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    assert fastcnn.vgg11(cifar=True, num_classes=100)(torch.randn(1, 3, 32, 32)).shape == (1, 100)


def test_vgg_columns_differ_where_the_paper_says():
    with torch.device("meta"):
        lrn, ones = fastcnn.vgg11_lrn(), fastcnn.vgg16_1x1()
    assert isinstance(lrn.features[2], nn.LocalResponseNorm)
    convs = [layer for layer in ones.features if isinstance(layer, nn.Conv2d)]
    assert [index for index, conv in enumerate(convs) if conv.kernel_size == (1, 1)] == [6, 9, 12]


TORCHVISION_NAMES = ["alexnet", "vgg11", "vgg11_bn", "vgg13", "vgg13_bn", "vgg16", "vgg16_bn", "vgg19", "vgg19_bn"]


@pytest.mark.parametrize("name", TORCHVISION_NAMES)
def test_keys_print_and_modules_equal_torchvisions(name):
    models = pytest.importorskip("torchvision.models")
    with torch.device("meta"):
        ours, theirs = getattr(fastcnn, name)(), models.get_model(name)
    assert str(ours) == str(theirs)
    assert [n for n, _ in ours.named_modules()] == [n for n, _ in theirs.named_modules()]
    assert [(n, p.shape) for n, p in ours.state_dict().items()] == [
        (n, p.shape) for n, p in theirs.state_dict().items()
    ]


@pytest.mark.parametrize(("name", "size"), [("alexnet", 96), ("vgg11_bn", 32)])
def test_weights_outputs_and_gradients_equal_torchvisions(name, size):
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    theirs = models.get_model(name, num_classes=10, dropout=0.0)
    torch.manual_seed(0)
    ours = getattr(fastcnn, name)(num_classes=10, dropout=0.0)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))

    x = torch.randn(2, 3, size, size)
    with fastcnn.use_backend("torch"):  # the same operations, as kernels may round a batch norm of few pixels otherwise
        for a, b in zip(output_and_gradients(ours, x), output_and_gradients(theirs, x), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)

    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)


@pytest.fixture
def downloads(monkeypatch):
    """Stands in for the network: what torchvision was asked to download, answered with weights of the right shapes."""
    models = pytest.importorskip("torchvision.models")
    asked = []

    def get_state_dict(weights, **settings):
        asked.append((weights, settings))
        with torch.device("meta"):
            return models.get_model(type(weights).__name__.removesuffix("_Weights").lower()).state_dict()

    monkeypatch.setattr(models.WeightsEnum, "get_state_dict", get_state_dict)
    return asked


@pytest.mark.filterwarnings("ignore:for .*copying from a non-meta parameter", "ignore:for .*no-op")
@pytest.mark.parametrize("name", ["alexnet", "vgg16"])
def test_pretrained_weights_come_through_torchvision(name, downloads):
    models = pytest.importorskip("torchvision.models")
    weights = models.get_model_weights(name).IMAGENET1K_V1
    build = getattr(fastcnn, name)
    with torch.device("meta"):
        assert build(weights=weights, progress=False).classifier[-1].out_features == 1000
        build(weights="IMAGENET1K_V1", num_classes=1000)
    assert downloads == [
        (weights, {"progress": False, "check_hash": True}),
        (weights, {"progress": True, "check_hash": True}),
    ]
    with pytest.raises(ValueError, match=r"num_classes: expected 1000, .*got 10"):
        build(weights=weights, num_classes=10)
    with pytest.raises(TypeError, match="Invalid Weight class"):
        build(weights=models.ResNet18_Weights.DEFAULT)


@pytest.mark.parametrize(
    ("build", "settings", "variant"),
    [
        (fastcnn.vgg11, {"cifar": True}, r"vgg11\(cifar=True\)"),
        (fastcnn.vgg11_lrn, {}, "vgg11_lrn"),
        (fastcnn.vgg16_1x1, {}, "vgg16_1x1"),
    ],
)
def test_variants_without_pretrained_weights_say_so(build, settings, variant):
    with pytest.raises(ValueError, match=f"weights: expected None, .*{variant}, got 'DEFAULT'"):
        build(weights="DEFAULT", **settings)


def test_pretrained_weights_without_torchvision_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    with pytest.raises(
        ImportError, match=r"alexnet: weights='DEFAULT' needs torchvision.*pip install 'fastcnn\[train\]'"
    ):
        fastcnn.alexnet(weights="DEFAULT")


@pytest.mark.parametrize(
    ("model", "module"),
    [("AlexNet", "alexnet"), ("AlexNet2012", "alexnet"), ("ConvNet", "convnet"), ("MnistCNN", "mnist"), ("VGG", "vgg")],
)
def test_whole_models_that_were_saved_find_their_classes(model, module):
    assert getattr(fastcnn, model).__module__ == f"fastcnn.models.{module}"
