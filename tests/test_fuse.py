"""fuse and unfuse: the same modules of the same classes run fused, and as before."""

import copy
import gc
import inspect
import logging
import pickle
import subprocess
import sys
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastcnn

STAGES = ["conv2d_relu_max_pool2d", "local_response_norm", "max_pool2d", "batch_norm_relu"]


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
        x = self.norm(self.features(x)) * self.scale
        x = self.block[0](self.pool(x) + self.shift)
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


def image():
    return torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def pair():
    """Return a network fused, and the same left stock."""
    model = Net()
    return fastcnn.fuse(copy.deepcopy(model)), model


def outcome(model):
    model.zero_grad()
    output = model(image())
    output.square().sum().backward()
    return [output, *(parameter.grad for parameter in model.parameters()), *model.buffers()]


def assert_runs_alike(fused, model):
    for actual, expected in zip(outcome(fused), outcome(model), strict=True):
        torch.testing.assert_close(actual, expected)


def forwards(model):
    """Return the names of the modules on which a forward is set."""
    return {name for name, module in model.named_modules() if "forward" in vars(module)}


def test_fused_model_runs_in_stages_and_computes_the_same(stages):
    fused, model = pair()
    assert_runs_alike(fused, model)
    assert stages == STAGES
    assert_runs_alike(fused.eval(), model.eval())


def test_every_module_stays_what_it_is_and_where_it_is():
    model = Net()
    before = [(name, module, type(module)) for name, module in model.named_modules()]
    keys, text = list(model.state_dict()), str(model)
    assert fastcnn.fuse(model) is model
    assert [(name, module, type(module)) for name, module in model.named_modules()] == before
    assert (list(model.state_dict()), str(model)) == (keys, text)
    assert forwards(model) == {"features", "norm", "pool", "block.0", "block.0.1"}
    assert list(inspect.signature(model.pool.forward).parameters) == ["input"]


def test_unfuse_takes_away_what_fuse_set_and_nothing_else():
    fused, model = pair()
    assert fastcnn.unfuse(fused) is fused
    for restored, stock in zip(fused.modules(), model.modules(), strict=True):
        assert vars(restored).keys() == vars(stock).keys()
    assert_runs_alike(fastcnn.unfuse(fastcnn.fuse(fastcnn.fuse(fused))), model)


def test_unfused_model_runs_torchs_layers_alone(stages):
    fastcnn.unfuse(fastcnn.fuse(Net()))(image())
    fastcnn.unfuse(fastcnn.MnistCNN())(torch.randn(1, 1, 28, 28))
    assert stages == []


def test_slice_is_stock_until_it_is_fused(stages):
    fused, model = pair()
    piece = fused.features[:2]
    assert type(piece) is nn.Sequential
    torch.testing.assert_close(piece(image()), model.features[:2](image()))
    assert stages == []
    torch.testing.assert_close(fastcnn.fuse(piece)(image()), model.features[:2](image()))
    assert stages == ["conv2d_relu"]


def test_one_layer_in_two_places_stays_one_layer(stages):
    block, pool = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()), nn.MaxPool2d(2)
    model = fastcnn.fuse(nn.ModuleDict({"a": block, "b": block, "c": pool, "d": nn.Sequential(pool)}))
    model["b"](model["a"](image()))
    model["d"](image())
    assert stages == ["conv2d_relu", "conv2d_relu", "max_pool2d"]
    assert forwards(model) == {"a", "d"}  # a pool of a Sequential runs in its stages


def test_pool_with_a_forward_of_fuse_joins_a_stage(stages):
    pool = fastcnn.fuse(nn.MaxPool2d(2))
    fastcnn.fuse(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), pool))(image())
    assert stages == ["conv2d_relu_max_pool2d"]


def test_subclass_with_a_forward_of_its_own_runs_that():
    class Doubled(nn.Sequential):
        def forward(self, input):
            return super().forward(input) * 2

    model = Doubled(nn.Conv2d(3, 4, 3), nn.MaxPool2d(2))
    expected = model(image())
    assert forwards(fastcnn.fuse(model)) == {"1"}
    torch.testing.assert_close(model(image()), expected)


def test_forward_that_somebody_has_set_before_is_left_alone():
    model = Net()
    theirs = model.features.forward = lambda x: x[:, :1].repeat(1, 4, 1, 1)
    expected = model(image())
    torch.testing.assert_close(fastcnn.fuse(model)(image()), expected)
    assert model.features.forward is theirs
    fastcnn.unfuse(model)
    assert model.features.forward is theirs


def test_forward_that_somebody_sets_later_wins_and_stays(stages):
    fused, model = pair()
    for each in (fused, model):
        each.features.forward = lambda x, run=each.features.forward: run(x) + 1
    assert_runs_alike(fused, model)
    assert stages == STAGES
    theirs = fused.features.forward
    assert fastcnn.unfuse(fused).features.forward is fastcnn.fuse(fused).features.forward is theirs
    assert_runs_alike(fused, model)


def test_forward_of_the_class_that_somebody_has_put_back_is_nobodys(stages):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    model[0].forward, model.forward = model[0].forward, model.forward  # as tools that wrap and unwrap leave it
    fastcnn.fuse(model)(image())
    assert stages == ["conv2d_relu"]


def test_hooks_run():
    model = fastcnn.fuse(Net())
    seen = []
    model.features.register_forward_hook(lambda *_: seen.append("features"))
    model.pool.register_forward_hook(lambda *_: seen.append("pool"))
    model.features[1].register_forward_hook(lambda *_: seen.append("relu"))
    model(image())
    assert seen == ["relu", "features", "pool"]


def test_copy_is_fused_and_its_own(stages):
    fused, model = pair()
    copied = copy.deepcopy(fused)
    with torch.no_grad():
        for parameter in fused.parameters():
            parameter.zero_()
    assert_runs_alike(copied, model)
    assert stages == STAGES
    shallow = copy.copy(copied.features)
    shallow._modules = {"0": nn.Identity()}
    torch.testing.assert_close(shallow(image()), image())


def test_replica_runs_its_own_layers(stages):
    model = fastcnn.fuse(nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(2)))
    replica = model._replicate_for_data_parallel()
    replica._modules = {"0": nn.MaxPool2d(2)}  # as nn.parallel.replicate fills it
    torch.testing.assert_close(replica(image()), F.max_pool2d(image(), 2))
    assert stages == ["max_pool2d"]


class KeepsLittle(nn.Sequential):
    """It says itself what is saved of it, and copied."""

    def __getstate__(self):
        return {name: value for name, value in vars(self).items() if name != "cache"}


def test_module_that_says_what_is_saved_is_copied_fused(stages):
    model = fastcnn.fuse(KeepsLittle(nn.Conv2d(3, 4, 3), nn.ReLU()))
    model.cache = object()
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert "cache" not in vars(copied)
        torch.testing.assert_close(copied(image()), nn.Sequential(*model)(image()))
    assert stages == ["conv2d_relu"]


LOAD = """
import sys
sys.modules["fastcnn"] = None
import torch
model, image, expected = torch.load(sys.argv[1], weights_only=False)
torch.testing.assert_close(model(image), expected)
assert not any("forward" in vars(module) for module in model.modules())
"""


def test_saved_model_loads_without_fastcnn_and_runs_stock(tmp_path):
    layers = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(100, 2)
    model = nn.Sequential(nn.Sequential(*layers[:3]), *layers[3:])
    expected = model(image())
    torch.save((fastcnn.fuse(model), image(), expected), tmp_path / "model.pt")
    ran = subprocess.run([sys.executable, "-c", LOAD, tmp_path / "model.pt"], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert forwards(model) == {"", "0"}


def test_saved_model_of_ours_loads_fused_unless_it_was_unfused():
    def loaded(model):
        return pickle.loads(pickle.dumps(model))

    model = fastcnn.MnistCNN()
    assert forwards(loaded(model)) == forwards(copy.deepcopy(model)) == {"", "layer1", "layer2", "fc"}
    fastcnn.unfuse(model.fc)
    assert forwards(copy.deepcopy(model)) == {"", "layer1", "layer2"}
    assert forwards(loaded(fastcnn.unfuse(model))) == forwards(copy.deepcopy(model)) == set()


def test_model_goes_away_at_once():
    model = fastcnn.fuse(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()))
    model(image())
    there, forward = weakref.ref(model), model.forward
    gc.disable()
    try:
        del model
        assert there() is None
    finally:
        gc.enable()
    with pytest.raises(ReferenceError, match="forward"):
        _ = forward.__code__


class SeesItself(nn.Module):
    """It refers to itself and to its layers in a list, a closure, a method and a hook."""

    def __init__(self):
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)
        self.layers, self.again, self.kept = [self.last], lambda x: self.relu(x), self.relu
        self.last.register_forward_hook(self.save)

    def relu(self, x):
        return F.relu(x) * 2

    def save(self, _layer, _inputs, output):
        self.seen = output

    def forward(self, x):
        x = F.relu(self.conv(x))
        return self.kept(self.again(self.layers[0](x))) + self.seen


def test_network_that_refers_to_itself_runs_fused(stages):
    model = SeesItself()
    expected = model(image())
    torch.testing.assert_close(fastcnn.fuse(model)(image()), expected)
    assert stages == ["conv2d_relu"]


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("build", [Net, fastcnn.MnistCNN])
def test_script_holds_the_stock_layers(build, caplog):
    x = image() if build is Net else torch.randn(2, 1, 28, 28)
    model = fastcnn.fuse(build()).eval()
    expected = model(x)
    sys.modules["fastcnn.instance"]._say_scripted.cache_clear()
    with caplog.at_level(logging.WARNING, "fastcnn"):
        scripted = torch.jit.script(model)
    torch.testing.assert_close(scripted(x), expected)
    assert "fastcnn::" not in str(scripted.inlined_graph)
    assert "call fastcnn.fuse again" in caplog.text
    torch.testing.assert_close(fastcnn.fuse(model)(x), expected)


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


def test_explain_leaves_the_model_as_it_is():
    model = Net()
    model.block = fastcnn.fuse(model.block)
    fastcnn.explain(model, (2, 3, 12, 12))
    assert forwards(model) == {"block.0", "block.0.1"}


def test_feature_extractor_finds_the_same_names():
    feature_extraction = pytest.importorskip("torchvision.models.feature_extraction")
    fused, model = pair()
    names = ["features.1", "features.2", "pool"]
    expected = feature_extraction.create_feature_extractor(model, names)(image())
    actual = feature_extraction.create_feature_extractor(fused, names)(image())
    for name in names:
        torch.testing.assert_close(actual[name], expected[name])
