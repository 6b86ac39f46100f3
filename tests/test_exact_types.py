"""Programs of others that look at the exact types of layers find a fused network as they find a stock one."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastcnn

models = pytest.importorskip("torchvision.models")
pytestmark = pytest.mark.filterwarnings("ignore")  # theirs


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 4, 3, padding=1, bias=False)
        self.bn, self.relu, self.pool = nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.relu(self.bn(self.conv(x))))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(Block(3), Block(4))
        self.classifier = nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).flatten(1))


def image(size: int = 16) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


def pair(build: Callable[[], nn.Module] = Net) -> tuple[Any, Any]:
    """Return a network in eval mode, fused, and the same left stock."""
    torch.manual_seed(0)
    stock = build().eval()
    return fastcnn.fuse(copy.deepcopy(stock)), stock


def kinds(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


BUILDERS = ["alexnet", "vgg11", "vgg11_bn", "vgg13", "vgg16", "vgg19"]


@pytest.mark.parametrize("name", BUILDERS)
def test_layers_of_our_models_are_of_torchvisions_types(name: str) -> None:
    with torch.device("meta"):
        ours, theirs = getattr(fastcnn, name)(), models.get_model(name)
    assert kinds(ours)[1:] == kinds(theirs)[1:]


def leaves(model: nn.Module) -> list[nn.Module]:
    found = []
    for layer in model.children():
        if type(layer) == nn.Sequential:  # noqa: E721  as people write it
            found += leaves(layer)
        elif not list(layer.children()):
            found.append(layer)
    return found


def test_walk_by_exact_type_finds_all_leaves() -> None:
    with torch.device("meta"):
        assert len(leaves(fastcnn.alexnet())) == len(leaves(models.alexnet())) == 21


def with_averages(model: nn.Module) -> nn.Module:
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.MaxPool2d:
                setattr(parent, name, nn.AvgPool2d(child.kernel_size))
    return model


def test_layers_swapped_by_exact_type() -> None:
    fused, stock = pair()
    before = stock(image())
    torch.testing.assert_close(with_averages(fused)(image()), with_averages(stock)(image()))
    assert not torch.allclose(stock(image()), before)


QUANTIZABLE = ["googlenet", "inception_v3", "mobilenet_v2", "mobilenet_v3_large", "resnet18", "shufflenet_v2_x0_5"]


def quantized(model: Any) -> list[type]:
    """Quantize a network of torchvision's to int8 in place, and return the types of its layers."""
    model.fuse_model()
    model.qconfig = torch.ao.quantization.get_default_qconfig("fbgemm")
    torch.ao.quantization.prepare(model, inplace=True)
    model(image(96))
    torch.ao.quantization.convert(model, inplace=True)
    return kinds(model)


@pytest.mark.parametrize("name", QUANTIZABLE)
def test_quantized_networks_are_equal_to_the_last_bit(name: str) -> None:
    settings = {"init_weights": False, "aux_logits": False} if name in ("googlenet", "inception_v3") else {}
    fused, stock = pair(lambda: getattr(models.quantization, name)(weights=None, **settings))
    assert quantized(fused) == quantized(stock)
    assert torch.equal(fused(image(96)), stock(image(96)))


def test_quantized_by_torch_fx() -> None:
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    mapping = torch.ao.quantization.get_default_qconfig_mapping("fbgemm")
    results = []
    for model in pair(lambda: models.resnet18(num_classes=4)):
        prepared = prepare_fx(model, mapping, (image(32),))
        prepared(image(32))
        converted = convert_fx(prepared)
        results.append((str(converted.code), converted(image(32))))
    assert results[0][0] == results[1][0]
    assert torch.equal(results[0][1], results[1][1])


def test_relevance_by_captum() -> None:
    LRP = pytest.importorskip("captum.attr").LRP
    fused, stock = pair()
    found = LRP(fused).attribute(image(), target=1)
    torch.testing.assert_close(found, LRP(stock).attribute(image(), target=1))
    assert found.abs().sum() > 0
    assert kinds(fused) == kinds(stock)


def test_operations_counted_by_ptflops() -> None:
    count = pytest.importorskip("ptflops").get_model_complexity_info
    settings = {"as_strings": False, "print_per_layer_stat": False, "backend": "pytorch"}
    ours, theirs = (count(model, (3, 16, 16), **settings) for model in pair())
    assert ours == theirs
    assert ours[0] > 0


def test_operations_counted_and_channels_pruned_by_torch_pruning() -> None:
    pruning = pytest.importorskip("torch_pruning")
    fused, stock = pair()
    counts = [pruning.utils.count_ops_and_params(model, image()) for model in (fused, stock)]
    assert counts[0] == counts[1]
    for model in (fused, stock):
        keeps = [model.classifier[-1]]
        importance = pruning.importance.MagnitudeImportance()
        pruner = pruning.pruner.MetaPruner(model, image(), importance, pruning_ratio=0.5, ignored_layers=keeps)
        pruner.step()
    assert str(fused) == str(stock)
    assert fused.features[0].conv.out_channels == 2
    torch.testing.assert_close(fused(image()), stock(image()))


def test_hooks_of_accelerate_wrap_and_unwrap(stages: list[str]) -> None:
    hooks = pytest.importorskip("accelerate.hooks")

    class Doubled(hooks.ModelHook):  # type: ignore[name-defined,misc]
        def post_forward(self, module: nn.Module, output: Any) -> Any:
            return output * 2

    fused, stock = pair()
    expected = stages_of(fused, stages)
    for model in (fused, stock):
        hooks.add_hook_to_module(model.features, Doubled())
        hooks.add_hook_to_module(model.features[0].conv, Doubled())
    torch.testing.assert_close(fused(image()), stock(image()))
    for model in (fused, stock):
        hooks.remove_hook_from_module(model, recurse=True)
    assert stages_of(fused, stages) == expected
    torch.testing.assert_close(fused(image()), stock(image()))
    assert stages_of(fastcnn.unfuse(fused), stages) == []


def stages_of(model: nn.Module, stages: list[str]) -> list[str]:
    stages.clear()
    model(image())
    return stages.copy()


def test_flops_of_stages_are_counted_by_torch() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    counts = []
    for model in pair():
        with FlopCounterMode(display=False) as counter, warnings.catch_warnings():
            model(image())
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1]


def test_functions_of_a_forward_count_too(stages: list[str]) -> None:
    class Functions(Net):
        def forward(self, x: Tensor) -> Tensor:
            return F.max_pool2d(F.relu(self.features[0].conv(x)), 2)

    fused, stock = pair(Functions)
    torch.testing.assert_close(with_averages(fused)(image()), with_averages(stock)(image()))
    assert stages == ["conv2d_relu_max_pool2d"]
