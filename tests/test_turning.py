"""Rows of convolutions that run in channels_last on the CPU: same numbers, gradients and strides, no other rows."""

import copy

import pytest
import torch
from parity import assert_within_twice
from torch import nn

import fastcnn
from fastcnn import stages
from fastcnn.models.resnet import BasicBlock

IMAGE = (4, 3, 64, 64)  # 2**18 activations of the first convolution


def network(channels=3, *rest):
    first = (nn.Conv2d(channels, 16, 3, padding=1), nn.ReLU(), nn.LocalResponseNorm(5), nn.MaxPool2d(2))
    second = (nn.Conv2d(16, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 5, 3), nn.ReLU(), nn.MaxPool2d(2))
    return fastcnn.fuse(nn.Sequential(*first, *second, *rest))


def layouts(model, x):
    """Return how the input of each stage lies."""
    found = []

    def note(roles, run, input, layers):
        found.append("channels_last" if input.stride(1) == 1 else "nchw")
        return run(input, *layers)

    with stages.noting(note):
        output = model(x)
    return output, found


def assert_alike(ours, expected, within):
    """Assert that layers are joined alike: rounding decides whether a ReLU passes the gradient of a value near zero."""
    differ = (ours - expected).detach().abs().flatten().quantile(0.999)
    assert differ <= within * expected.detach().abs().max()


@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize("rest", [(), (nn.Flatten(), nn.Linear(5 * 15 * 15, 64), nn.ReLU())], ids=["alone", "more"])
@torch.no_grad()
def test_numbers_and_strides_are_stocks(channels, rest):
    model, x = network(channels, *rest), torch.randn(4, channels, 64, 64)
    output, found = layouts(model, x)
    assert found[:4] == ["channels_last"] * 4
    stock = fastcnn.unfuse(copy.deepcopy(model))
    expected, truth = stock(x), copy.deepcopy(stock).double()(x.double())
    assert output.stride() == expected.stride()
    assert_within_twice(output, expected, truth)


@torch.no_grad()
def test_strides_of_one_pixel_are_stocks():
    row = (nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(64))
    x = torch.randn(IMAGE)
    output, found = layouts(fastcnn.fuse(nn.Sequential(*row)), x)
    assert found == ["channels_last", "channels_last"]
    assert output.stride() == nn.Sequential(*row)(x).stride()


@torch.no_grad()
def test_a_row_is_turned_back_where_weights_outnumber_activations():
    first = (nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(16))
    second = (nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 5, 3, padding=1), nn.ReLU())  # 4,096, 36,864
    model, x = fastcnn.fuse(nn.Sequential(*first, *second)), torch.randn(IMAGE)
    output, found = layouts(model, x)
    assert found == ["channels_last"] * 2 + ["nchw"] * 2
    stock = fastcnn.unfuse(copy.deepcopy(model))
    expected, truth = stock(x), copy.deepcopy(stock).double()(x.double())
    assert output.stride() == expected.stride()
    assert_within_twice(output, expected, truth)


@pytest.mark.parametrize("frozen", [(), ("0.weight",), ("0.weight", "0.bias", "4.weight", "4.bias")], ids=len)
@pytest.mark.parametrize("of_input", [False, True])
def test_gradients_and_their_strides_are_stocks(of_input, frozen):
    model = network(3, nn.Flatten(), nn.Linear(5 * 15 * 15, 4))
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    stock = fastcnn.unfuse(copy.deepcopy(model))
    x, found = torch.randn(IMAGE, requires_grad=of_input), []
    outputs, gradients = [], []
    for run in (model, stock):
        own = x.detach().clone().requires_grad_(of_input)
        output, lie = layouts(run, own)
        found.append(lie)
        wanted = [each for each in (own, *run.parameters()) if each.requires_grad]
        outputs.append(output)
        gradients.append(torch.autograd.grad(output.square().sum(), wanted))
    assert found[0][:4] == ["channels_last"] * 4
    for ours, expected in zip((outputs[0], *gradients[0]), (outputs[1], *gradients[1]), strict=True):
        assert ours.stride() == expected.stride()
        assert_alike(ours, expected, within=1e-5)


def test_hooks_on_weights_see_the_strides_of_stock():
    model, seen = network(), []
    for layer in (model[0], model[4]):
        layer.weight.register_hook(lambda gradient: seen.append(gradient.is_contiguous()))
    output, found = layouts(model, torch.randn(IMAGE))
    output.sum().backward()
    assert "channels_last" in found
    assert seen == [True, True]


def test_a_changed_weight_is_noticed_in_the_backward():
    model = network()
    output, found = layouts(model, torch.randn(IMAGE))
    with torch.no_grad():
        model[4].weight.mul_(2)
    assert "channels_last" in found
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@pytest.mark.parametrize("place", [0, 3, 4])
def test_a_stride_of_zero_is_named_in_an_error_as_in_stock(place):
    model = network()
    model[place].stride = (0, 0)
    for run in (model, fastcnn.unfuse(copy.deepcopy(model))):
        with pytest.raises(RuntimeError, match="stride"):
            run(torch.randn(IMAGE))


def test_second_derivatives():
    model, x = network(), torch.randn(IMAGE, requires_grad=True)
    stock, penalties = fastcnn.unfuse(copy.deepcopy(model)), []
    for run in (model, stock, copy.deepcopy(stock).double()):
        own = x.detach().to(next(run.parameters()).dtype).requires_grad_()
        (slope,) = torch.autograd.grad(run(own).sum(), own, create_graph=True)
        penalties.append(torch.autograd.grad(slope.square().sum(), run[4].weight)[0])
    assert_within_twice(*penalties)


def test_after_an_error_convolutions_are_as_before():
    model = network()

    def fail(roles, run, input, layers):
        raise KeyError("any")

    with stages.noting(fail), pytest.raises(KeyError):
        model(torch.randn(IMAGE))
    lone, x = network()[:2], torch.randn(2, 3, 5, 5).to(memory_format=torch.channels_last)
    strides = [
        torch.autograd.grad(each(x).sum(), each[0].weight)[0].stride()
        for each in (fastcnn.fuse(lone), fastcnn.unfuse(copy.deepcopy(lone)))
    ]
    assert strides[0] == strides[1]
    assert strides[0][1] == 1  # stock gives the input's layout there


def under(backend):
    def run(model, x):
        with fastcnn.use_backend(backend):
            return model(x)

    return run


def autocast(model, x):
    with torch.autocast("cpu", torch.bfloat16):
        return model(x)


OTHERS = {
    "autocast": autocast,
    "stock": under("torch"),
    "few activations": lambda model, x: model(x[:1, :, :32, :32]),
    "float64": lambda model, x: model.double()(x.double()),
    "vmap": lambda model, x: torch.vmap(model)(x[None]),
    "no batch": lambda model, x: model(torch.randn(3, 128, 128)),
}


@pytest.mark.parametrize("run", OTHERS.values(), ids=OTHERS)
@torch.no_grad()
def test_other_calls_stay_as_they_lie(run):
    model, x = network(), torch.randn(IMAGE)
    assert set(layouts(lambda x: run(model, x), x)[1]) == {"nchw"}


@pytest.mark.parametrize("weights", ["nchw", "channels_last"])
@pytest.mark.parametrize("images", ["nchw", "channels_last"])
@torch.no_grad()
def test_output_lies_as_stocks(images, weights):
    formats = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
    model, x = network().to(memory_format=formats[weights]), torch.randn(IMAGE).to(memory_format=formats[images])
    assert model(x).stride() == fastcnn.unfuse(copy.deepcopy(model))(x).stride()


@torch.no_grad()
def test_rows_with_little_after_the_first_convolution_stay():
    lone = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.MaxPool2d(2))
    small = nn.Sequential(*lone, nn.Conv2d(16, 4, 3, 2), nn.ReLU())
    for model in (lone, small):
        assert "channels_last" not in layouts(fastcnn.fuse(model), torch.randn(IMAGE))[1]


@pytest.mark.parametrize("tracks", [True, False])
@torch.no_grad()
def test_batch_norms(tracks):
    norms = [nn.BatchNorm2d(16, track_running_stats=tracks) for _ in range(2)]
    first = (nn.Conv2d(3, 16, 3), norms[0], nn.ReLU(), nn.MaxPool2d(2))
    model = fastcnn.fuse(nn.Sequential(*first, nn.Conv2d(16, 16, 3), norms[1], nn.ReLU())).eval()
    for norm in norms if tracks else ():
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    x = torch.randn(IMAGE)
    output, found = layouts(model, x)
    assert found == ["channels_last"] * 2
    stock = fastcnn.unfuse(copy.deepcopy(model))
    expected, truth = stock(x), copy.deepcopy(stock).double()(x.double())
    assert output.stride() == expected.stride()
    assert_within_twice(output, expected, truth)


@torch.no_grad()
def test_a_weight_that_is_computed_is_looked_at_as_often_as_in_stock():
    looks = []

    class Counted(nn.Module):
        def forward(self, weight):
            looks.append(1)
            return weight

    model = network()
    torch.nn.utils.parametrize.register_parametrization(model[4], "weight", Counted())
    looks.clear()
    assert "channels_last" not in layouts(model, torch.randn(IMAGE))[1]
    assert len(looks) == 1


RESNET = 32, 3, 32, 32


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("training", [True, False])
def test_blocks_of_our_residual_network(training, stride):
    model = fastcnn.fuse(nn.Sequential(BasicBlock(16, 16 * stride, stride))).train(training)
    stock, x = fastcnn.unfuse(copy.deepcopy(model)), torch.randn(32, 16, 32, 32)
    outputs, gradients = [], []
    for run in (model, stock):
        output, found = layouts(run, own := x.clone().requires_grad_())
        assert set(found) <= {"channels_last"}
        outputs.append(output)
        gradients.append(torch.autograd.grad(output.square().sum(), [own, *run.parameters()]))
    for ours, expected in zip((outputs[0], *gradients[0]), (outputs[1], *gradients[1]), strict=True):
        assert ours.stride() == expected.stride()
        assert_alike(ours, expected, within=5e-4)


@pytest.mark.parametrize(
    "change",
    [
        lambda block: block.layers[3].register_forward_hook(lambda *_: None),
        lambda block: block.layers.register_forward_hook(lambda *_: None),
        lambda block: block.register_forward_hook(lambda *_: None),
        lambda block: block.layers.__setitem__(1, nn.GroupNorm(2, 16)),
    ],
    ids=["hook on a layer", "hook on a row", "hook on a block", "another layer"],
)
@torch.no_grad()
def test_a_block_that_shows_its_strides_stays(change):
    model = fastcnn.resnet_cifar()
    change(model.blocks[0])
    assert "channels_last" not in layouts(model, torch.randn(RESNET))[1]
