"""fuse and unfuse: other containers and pools around the same layers."""

import copy
import gc
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastcnn


class Net(nn.Module):
    """A network as users write one: a Sequential, a lone pool and norm, and calls of functions."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.MaxPool2d(2))
        self.norm = nn.LocalResponseNorm(3)
        self.pool = nn.MaxPool2d(2)
        self.block = nn.ModuleList([nn.Sequential(nn.Conv2d(4, 5, 1), nn.Sequential(nn.BatchNorm2d(5), nn.ReLU()))])
        self.fc = nn.Linear(5, 2)
        self.scale = nn.Parameter(torch.ones(1))
        self.register_buffer("shift", torch.zeros(1))

    def forward(self, x):
        x = self.pool(self.norm(self.features(x)))
        x = self.block[0](x * self.scale + self.shift)
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


def image():
    return torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def types_by_name(model):
    return {name: type(module) for name, module in model.named_modules()}


def test_fused_model_computes_the_same_and_trains_the_same_parameters():
    model = Net()
    fused = fastcnn.fuse(model)
    torch.testing.assert_close(fused(image()), model(image()))

    fused(image()).sum().backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    model(image()).sum().backward()
    for actual, expected in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(actual, expected.grad)


def test_containers_and_lone_layers_are_replaced():
    types = types_by_name(fastcnn.fuse(Net()))
    assert types["features"] is types["block.0"] is types["block.0.1"] is fastcnn.nn.Sequential
    assert types["norm"] is fastcnn.nn.LocalResponseNorm
    assert types["pool"] is fastcnn.nn.MaxPool2d


def test_layers_parameters_and_buffers_are_the_very_same():
    model = Net()
    fused = fastcnn.fuse(model)
    assert all(a is b for a, b in zip(fused.features, model.features, strict=True))
    assert fused.fc is model.fc
    assert all(a is b for a, b in zip(fused.parameters(), model.parameters(), strict=True))
    assert all(a is b for a, b in zip(fused.buffers(), model.buffers(), strict=True))


def test_names_keys_and_print_are_equal():
    model = Net()
    fused = fastcnn.fuse(model)
    assert str(fused) == str(model)
    assert list(types_by_name(fused)) == list(types_by_name(model))
    assert list(fused.state_dict()) == list(model.state_dict())


def test_original_is_left_alone():
    model = Net()
    before = types_by_name(model)
    children = list(model.modules())
    fastcnn.fuse(model)
    assert types_by_name(model) == before
    assert all(a is b for a, b in zip(model.modules(), children, strict=True))


def test_unfuse_undoes_fuse():
    model = Net()
    restored = fastcnn.unfuse(fastcnn.fuse(model))
    assert types_by_name(restored) == types_by_name(model)
    assert all(a is b for a, b in zip(restored.parameters(), model.parameters(), strict=True))
    torch.testing.assert_close(restored(image()), model(image()))


def test_unfuse_makes_a_model_of_ours_stock():
    model = fastcnn.MnistCNN()
    stock = fastcnn.unfuse(model)
    assert not any(type(module).__module__ == "fastcnn.nn" for module in stock.modules())
    assert stock.fc[0] is model.fc[0]


def test_second_fuse_changes_nothing():
    fused = fastcnn.fuse(Net())
    assert fastcnn.fuse(fused) is fused
    assert fastcnn.unfuse(Net().fc).in_features == 5


def test_one_layer_in_two_places_stays_one_layer():
    block = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU())
    pool = nn.MaxPool2d(2)
    model = nn.ModuleDict({"a": block, "b": block, "c": pool, "d": pool, "e": nn.Sequential(pool)})
    fused = fastcnn.fuse(model)
    assert fused["a"] is fused["b"]
    assert type(fused["a"]) is fastcnn.nn.Sequential
    assert fused["c"] is fused["d"] is fused["e"][0]
    assert list(types_by_name(fused)) == list(types_by_name(model))


def test_root_may_be_a_single_layer():
    assert type(fastcnn.fuse(nn.MaxPool2d(2))) is fastcnn.nn.MaxPool2d
    assert type(fastcnn.fuse(nn.Sequential())) is fastcnn.nn.Sequential
    linear = nn.Linear(2, 2)
    assert fastcnn.fuse(linear) is linear


def test_subclasses_stay_what_they_are():
    class Doubled(nn.Sequential):
        def forward(self, input):
            return super().forward(input) * 2

    model = Doubled(nn.Conv2d(3, 4, 3), nn.MaxPool2d(2))
    fused = fastcnn.fuse(model)
    assert type(fused) is Doubled
    assert type(fused[1]) is fastcnn.nn.MaxPool2d
    torch.testing.assert_close(fused(image()), model(image()))


def test_hooks_and_mode_come_along():
    model = Net().eval()
    seen = []
    model.features.register_forward_hook(lambda layer, *_: seen.append("features"))
    model.pool.register_forward_hook(lambda layer, *_: seen.append("pool"))
    model.register_forward_hook(lambda layer, *_: seen.append("net"))
    fused = fastcnn.fuse(model)
    fused(image())
    assert seen == ["features", "pool", "net"]
    assert not any(module.training for module in fused.modules())


def test_moving_and_freezing_reach_both():
    model = Net()
    fused = fastcnn.fuse(model)
    fused.double().requires_grad_(False)
    assert {tensor.dtype for tensor in (*model.parameters(), model.shift)} == {torch.float64}
    assert not any(parameter.requires_grad for parameter in model.parameters())
    torch.testing.assert_close(fused(image().double()), model(image().double()))


def test_optimizer_step_on_the_fused_model_trains_the_original():
    model = Net()
    fused = fastcnn.fuse(model)
    before = model.features[0].weight.clone()
    optimizer = torch.optim.SGD(fused.parameters(), lr=0.1)
    fused(image()).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model.features[0].weight, before)
    torch.testing.assert_close(fused(image()), model(image()))


def test_methods_kept_as_attributes_run_on_the_fused_model():
    class Switched(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
            self.run = self.run_body

        def run_body(self, x):
            return self, self.body(x)

        def forward(self, x):
            return self.run(x)

    fused = fastcnn.fuse(Switched())
    assert fused(torch.ones(1, 2))[0] is fused


def test_load_state_dict_hooks_outlive_the_original():
    class Renaming(Net):
        def __init__(self):
            super().__init__()
            self.register_load_state_dict_pre_hook(self.rename)

        @staticmethod
        def rename(_module, state_dict, *_):
            state_dict["fc.weight"] = state_dict.pop("head.weight")

    model = Renaming()
    fused = fastcnn.fuse(model)
    state = {name.replace("fc.weight", "head.weight"): value for name, value in model.state_dict().items()}
    del model
    gc.collect()
    fused.load_state_dict(state)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_fused_model_can_be_copied(duplicate):
    fused = fastcnn.fuse(Net())
    copied = duplicate(fused)
    torch.testing.assert_close(copied(image()), fused(image()))
    assert types_by_name(copied) == types_by_name(fused)
    assert copied.fc.weight is not fused.fc.weight


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
def test_scripted_parts_stay_as_they_are():
    scripted = torch.jit.script(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()))
    fused = fastcnn.fuse(nn.Sequential(scripted, nn.MaxPool2d(2)))
    assert fused[0] is scripted
    torch.testing.assert_close(fused(image()), F.max_pool2d(scripted(image()), 2))
    with pytest.raises(TypeError, match=r"model: .*RecursiveScriptModule"):
        fastcnn.fuse(scripted)


@pytest.mark.parametrize("function", [fastcnn.fuse, fastcnn.unfuse])
@pytest.mark.parametrize("wrong", [None, nn.Linear, {"weight": 1}])
def test_not_a_module(function, wrong):
    with pytest.raises(TypeError, match=r"model: expected an nn\.Module, got"):
        function(wrong)


def test_compiled_model_is_refused():
    with pytest.raises(TypeError, match="compiled"):
        fastcnn.fuse(torch.compile(Net(), backend="eager"))
    model = Net()
    model.compile(backend="eager")
    with pytest.raises(TypeError, match="compiled"):
        fastcnn.fuse(model)


def test_feature_extractor_finds_the_same_names():
    feature_extraction = pytest.importorskip("torchvision.models.feature_extraction")
    model = Net()
    names = ["features.1", "features.2", "pool"]
    expected = feature_extraction.create_feature_extractor(model, names)(image())
    actual = feature_extraction.create_feature_extractor(fastcnn.fuse(model), names)(image())
    for name in names:
        torch.testing.assert_close(actual[name], expected[name])


def test_torchvision_network():
    models = pytest.importorskip("torchvision.models")
    model = models.resnet18(num_classes=10).eval()
    fused = fastcnn.fuse(model)
    x = torch.randn(1, 3, 64, 64)
    assert type(fused.maxpool) is fastcnn.nn.MaxPool2d
    torch.testing.assert_close(fused(x), model(x))
