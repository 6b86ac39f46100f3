"""torch.compile, torch.export, tracers and other tools find in a fused model what they find in a stock one."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.torch_version import TorchVersion

import fastcnn


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()


def images():
    return torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(0))


def conv_relu_pool():
    return fastcnn.nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2))


def gradients(model, run):
    model.zero_grad()
    run(images()).square().sum().backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


def test_compiles_without_a_break_with_gradients():
    model = fastcnn.MnistCNN()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images()), model(images()))
    for actual, expected in zip(gradients(model, compiled), gradients(model, model), strict=True):
        torch.testing.assert_close(actual, expected)


def test_fused_stages_are_what_is_compiled(monkeypatch):
    sizes = []
    conv2d_relu_max_pool2d = fastcnn.functional.conv2d_relu_max_pool2d

    def recorded(*args, pool_size, **kwargs):
        sizes.append(pool_size)
        return conv2d_relu_max_pool2d(*args, pool_size=pool_size, **kwargs)

    monkeypatch.setattr(fastcnn.functional, "conv2d_relu_max_pool2d", recorded)
    torch.compile(fastcnn.MnistCNN(), fullgraph=True, backend="eager")(images())
    assert sizes == [2, 2]


def assert_hook_added_after_compiling_fires(child):
    model = fastcnn.MnistCNN()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    expected = compiled(images())
    seen = []
    model.layer1[child].register_forward_hook(lambda _layer, _args, output: seen.append(output.shape))
    torch.testing.assert_close(compiled(images()), expected)
    assert len(seen) == 1


@pytest.mark.skipif(
    TorchVersion(torch.__version__) < "2.14", reason="older torch.compile looks for new hooks only when told"
)
@pytest.mark.parametrize("child", [0, 1, 2])
def test_hook_added_after_compiling_fires(child):
    assert_hook_added_after_compiling_fires(child)


@pytest.mark.parametrize("child", [0, 1, 2])
def test_hook_added_after_compiling_fires_where_torch_is_told_to_look(child):
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=False):
        assert_hook_added_after_compiling_fires(child)


def test_layer_swapped_after_compiling_counts():
    model = fastcnn.nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    x = torch.randn(4, 3)
    compiled(x)
    model[1] = nn.Sigmoid()
    torch.testing.assert_close(compiled(x), torch.sigmoid(model[0](x)))


def layers_of_ours():
    return nn.Sequential(
        fastcnn.nn.ConvReLUMaxPool2d(1, 4, 3, pool_size=2),
        fastcnn.nn.LocalResponseNorm(3),
        fastcnn.nn.ConvReLU2d(4, 4, 3, padding=1, padding_mode="reflect"),
        fastcnn.nn.MaxPool2d(2),
    )


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("build", [fastcnn.MnistCNN, layers_of_ours])
def test_exported_program_holds_torch_operators_only(build, strict, monkeypatch):
    model = build()
    with monkeypatch.context() as without_fused_functions:
        without_fused_functions.setattr("fastcnn.nn.FF", None)
        without_fused_functions.setattr("fastcnn.stages.FF", None)
        exported = torch.export.export(model, (images(),), strict=strict)
    operators = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
    assert operators
    assert all(operator.startswith("aten.") for operator in operators)
    torch.testing.assert_close(exported.module()(images()), model(images()))


def test_layers_of_ours_compile():
    model = layers_of_ours()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images()), model(images()))


def test_symbolic_trace_records_the_children():
    model = conv_relu_pool()
    traced = torch.fx.symbolic_trace(model)
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["0", "1", "2"]
    torch.testing.assert_close(traced(images()), model(images()))


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
def test_jit_trace_records_stock_operators(monkeypatch):
    model = conv_relu_pool()
    with monkeypatch.context() as without_fused_functions:
        without_fused_functions.setattr("fastcnn.nn.FF", None)
        without_fused_functions.setattr("fastcnn.stages.FF", None)
        traced = torch.jit.trace(model, images(), check_trace=False)
    torch.testing.assert_close(traced(images()), model(images()))


def test_torchinfo_sees_every_layer():
    torchinfo = pytest.importorskip("torchinfo")
    rows = torchinfo.summary(conv_relu_pool(), input_data=images(), verbose=0).summary_list
    assert [row.output_size for row in rows if row.is_leaf_layer] == [[2, 4, 26, 26], [2, 4, 26, 26], [2, 4, 13, 13]]


def test_feature_extractor_finds_every_layer():
    feature_extraction = pytest.importorskip("torchvision.models.feature_extraction")
    model = conv_relu_pool()
    features = feature_extraction.create_feature_extractor(model, ["0", "1", "2"])(images())
    assert features["0"].min() < 0
    torch.testing.assert_close(features["1"], F.relu(features["0"]))
    torch.testing.assert_close(features["2"], model(images()))
