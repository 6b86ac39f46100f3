"""Rows of convolutions that run in channels_last on the CPU in inference: same numbers and strides, no other rows."""

import copy

import pytest
import torch
from parity import assert_within_twice
from torch import nn

import fastcnn
from fastcnn import stages

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


def under(backend):
    def run(model, x):
        with fastcnn.use_backend(backend):
            return model(x)

    return run


def with_gradients(model, x):
    with torch.enable_grad():
        return model(x)


def autocast(model, x):
    with torch.autocast("cpu", torch.bfloat16):
        return model(x)


OTHERS = {
    "gradients": with_gradients,
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
def test_a_row_with_one_convolution_or_the_statistics_of_a_batch_stays():
    x = torch.randn(IMAGE)
    lone = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.MaxPool2d(2))
    norm = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 4, 3), nn.ReLU())
    for model in (lone, norm):
        assert "channels_last" not in layouts(fastcnn.fuse(model), x)[1]


@pytest.mark.parametrize("tracks", [True, False])
@torch.no_grad()
def test_batch_norms_in_inference(tracks):
    norms = [nn.BatchNorm2d(channels, track_running_stats=tracks) for channels in (16, 8)]
    first = (nn.Conv2d(3, 16, 3), norms[0], nn.ReLU(), nn.MaxPool2d(2))
    model = fastcnn.fuse(nn.Sequential(*first, nn.Conv2d(16, 8, 3), norms[1], nn.ReLU())).eval()
    for norm in norms if tracks else ():
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    x = torch.randn(IMAGE)
    output, found = layouts(model, x)
    assert found == (["channels_last"] * 2 if tracks else ["nchw"] * 2)
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
