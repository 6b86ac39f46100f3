"""fastcnn.nn: children run in stages, and nothing but the speed tells a user so."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from parity import assert_within_twice
from torch import nn
from torch.nn.utils import parametrizations, prune

import fastcnn

IMAGES = 16


def image(channels=3, size=9):
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(0))


def conv(**settings):
    return nn.Conv2d(3, 4, 3, **settings)


def conv_relu_pool():
    return fastcnn.nn.Sequential(conv(), nn.ReLU(), nn.MaxPool2d(2))


def output_and_gradients(model, x):
    """The output, then the gradients of the input and of every parameter."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = model(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(parameter.grad.clone() for parameter in model.parameters())]


def of_many(model, images):
    """Outputs and gradients for many images: the largest error of a few gradients of one is left to chance."""
    return [torch.stack(each) for each in zip(*(output_and_gradients(model, x) for x in images), strict=True)]


def assert_runs_as_stock(model, x):
    images = [x, *(torch.randn_like(x) for _ in range(IMAGES - 1))]
    stock = nn.Sequential(*model)
    mine, theirs = of_many(model, images), of_many(stock, images)
    stock.double()  # in place: the layers may be no leaves, which no copy takes
    truth = of_many(stock, [image.double() for image in images])
    for row in zip(mine, theirs, truth, strict=True):
        assert_within_twice(*row)


class KeepsForward(nn.Conv2d):
    pass


class OwnForward(nn.Conv2d):
    def forward(self, input):
        return super().forward(input) + 1


class OwnConvForward(nn.Conv2d):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, weight, bias) + 1


class OwnCheck(nn.BatchNorm2d):
    def _check_input_dim(self, input):
        super()._check_input_dim(input * 2)


class OwnCall(nn.Conv2d):
    def __call__(self, input):
        return super().__call__(input) + 1


STAGE_CASES = {
    "conv relu": ([conv(), nn.ReLU()], ["conv2d_relu"]),
    "conv relu pool": ([conv(), nn.ReLU(), nn.MaxPool2d(2)], ["conv2d_relu_max_pool2d"]),
    "every setting of conv and pool": (
        [nn.Conv2d(3, 6, (3, 2), (2, 1), (2, 1), (1, 2), 3, False), nn.ReLU(), nn.MaxPool2d(3, 2, 1, ceil_mode=True)],
        ["conv2d_relu_max_pool2d"],
    ),
    "padding same": ([conv(padding="same"), nn.ReLU()], ["conv2d_relu"]),
    "padding mode reflect": ([conv(padding=1, padding_mode="reflect"), nn.ReLU()], ["conv2d_relu"]),
    "lrn": ([nn.LocalResponseNorm(3, 0.1, 0.5, 2.0)], ["local_response_norm"]),
    "lrn pool": ([nn.LocalResponseNorm(3), nn.MaxPool2d(2)], ["local_response_norm_max_pool2d"]),
    "pool": ([nn.MaxPool2d((3, 2), (2, 3), (1, 0))], ["max_pool2d"]),
    "linear relu": ([nn.Flatten(), nn.Linear(243, 5), nn.ReLU()], ["linear_relu"]),
    "linear without bias": ([nn.Flatten(), nn.Linear(243, 5, bias=False), nn.ReLU()], ["linear_relu"]),
    "conv relu lrn pool": (
        [conv(), nn.ReLU(), nn.LocalResponseNorm(3), nn.MaxPool2d(2)],
        ["conv2d_relu", "local_response_norm_max_pool2d"],
    ),
    "dilated pool": ([conv(), nn.ReLU(), nn.MaxPool2d(2, dilation=2)], ["conv2d_relu", "max_pool2d"]),
    "pool pool": ([nn.MaxPool2d(2), nn.MaxPool2d(2)], ["max_pool2d", "max_pool2d"]),
    "twins": ([fastcnn.nn.LocalResponseNorm(3), fastcnn.nn.MaxPool2d(2)], ["local_response_norm_max_pool2d"]),
    "subclass that keeps forward": ([KeepsForward(3, 4, 3), nn.ReLU()], ["conv2d_relu"]),
    "conv batch norm relu pool": (
        [conv(bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)],  # a bias has no gradient but rounding errors
        ["batch_norm_relu_max_pool2d"],
    ),
    "conv batch norm relu": ([conv(bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Sigmoid()], ["batch_norm_relu"]),
    "conv batch norm": ([conv(bias=False), nn.BatchNorm2d(4), nn.Sigmoid()], []),
    "batch norm relu pool": (
        [nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(3, 2, 1, ceil_mode=True)],
        ["batch_norm_relu_max_pool2d"],
    ),
    "batch norm relu": ([nn.BatchNorm2d(3, 0.1, None, affine=False), nn.ReLU()], ["batch_norm_relu"]),
    "batch norm alone": ([nn.BatchNorm2d(3), nn.MaxPool2d(2)], ["max_pool2d"]),
    "batch norm of rows": ([nn.Flatten(), nn.BatchNorm1d(243), nn.ReLU()], []),
    "own check of the input": ([conv(), OwnCheck(4), nn.ReLU()], []),
    "identities between": (
        [nn.Identity(), conv(), nn.Identity(), nn.ReLU(), nn.MaxPool2d(2), nn.Identity()],
        ["conv2d_relu_max_pool2d"],
    ),
    "identity at the end": ([nn.MaxPool2d(2), nn.Identity()], ["max_pool2d"]),
    "conv alone": ([conv(), nn.Sigmoid()], []),
    "relu alone": ([nn.ReLU()], []),
    "other activation": ([conv(), nn.ReLU6()], []),
    "transposed conv": ([nn.ConvTranspose2d(3, 4, 3), nn.ReLU()], []),
    "own forward": ([OwnForward(3, 4, 3), nn.ReLU()], []),
    "own _conv_forward": ([OwnConvForward(3, 4, 3), nn.ReLU()], []),
    "own call": ([OwnCall(3, 4, 3), nn.ReLU()], []),
    "no children": ([], []),
}


@pytest.mark.parametrize("case", STAGE_CASES)
def test_children_run_in_these_stages_as_stock(case, stages):
    layers, expected = STAGE_CASES[case]
    model = fastcnn.nn.Sequential(*layers)
    model(image())
    assert stages == expected
    assert_runs_as_stock(model, image())


def test_pool_that_returns_indices_ends_no_stage(stages):
    model = fastcnn.nn.Sequential(conv(), nn.ReLU(), nn.MaxPool2d(2, return_indices=True))
    for actual, expected in zip(model(image()), nn.Sequential(*model)(image()), strict=True):
        torch.testing.assert_close(actual, expected)
    assert stages == ["conv2d_relu", "max_pool2d"]


def test_unbatched_image(stages):
    model = conv_relu_pool()
    torch.testing.assert_close(model(image()[0]), nn.Sequential(*model)(image()[0]))
    assert stages == ["conv2d_relu_max_pool2d"]


def test_keys_names_print_and_seeded_weights_equal_stock():
    def build(container):
        torch.manual_seed(0)
        return container(conv(), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 2))

    ours, stock = build(fastcnn.nn.Sequential), build(nn.Sequential)
    assert str(ours) == str(stock)
    assert [name for name, _ in ours.named_modules()] == [name for name, _ in stock.named_modules()]
    assert list(ours.state_dict()) == list(stock.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), stock.parameters(), strict=True))


def test_slice_that_ends_before_a_relu_gives_values_before_it():
    model = fastcnn.nn.Sequential(conv(), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.ReLU())
    cut = model[:3]
    assert type(cut) is fastcnn.nn.Sequential
    torch.testing.assert_close(cut(image()), model[2](F.relu(model[0](image()))))
    assert cut(image()).min() < 0


def test_joined_and_repeated_containers_stay_fused():
    model = fastcnn.nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    assert type(model + nn.Sequential(nn.Linear(2, 2))) is fastcnn.nn.Sequential
    assert type(model * 2) is type(2 * model) is fastcnn.nn.Sequential
    assert str(model + model) == str(nn.Sequential(*model) + nn.Sequential(*model))


def test_swapped_and_appended_children_count(stages):
    model = conv_relu_pool()
    model[1] = nn.Sigmoid()
    model.append(nn.LocalResponseNorm(3))
    assert_runs_as_stock(model, image())
    assert stages == ["max_pool2d", "local_response_norm"] * IMAGES


HOOKS = {
    "forward": lambda layer, hook: layer.register_forward_hook(hook),
    "forward pre": lambda layer, hook: layer.register_forward_pre_hook(hook),
    "full backward": lambda layer, hook: layer.register_full_backward_hook(hook),
    "full backward pre": lambda layer, hook: layer.register_full_backward_pre_hook(hook),
}


@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize(("child", "expected"), [(0, ["max_pool2d"]), (1, ["max_pool2d"]), (2, ["conv2d_relu"])])
def test_hooked_child_runs_itself_and_its_neighbours_fused(kind, child, expected, stages):
    model = conv_relu_pool()
    fired = []
    handle = HOOKS[kind](model[child], lambda layer, *_: fired.append(layer))
    output_and_gradients(model, image())
    assert fired == [model[child]]
    assert stages == expected

    handle.remove()
    stages.clear()
    model(image())
    assert stages == ["conv2d_relu_max_pool2d"]


def test_forward_hook_can_change_the_value():
    model = conv_relu_pool()
    model[0].register_forward_hook(lambda _layer, _args, output: output + 1)
    torch.testing.assert_close(model(image()), nn.Sequential(*model)(image()))


def test_hook_of_all_modules_sees_every_layer():
    model = conv_relu_pool()
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda layer, *_: seen.append(layer))
    try:
        model(image())
    finally:
        handle.remove()
    assert seen == [*model, model]


def test_forward_replaced_on_one_child_is_called(stages):
    model = conv_relu_pool()
    original = model[0].forward
    model[0].forward = lambda input: original(input) + 1
    torch.testing.assert_close(model(image()), nn.Sequential(*model)(image()))
    assert stages == ["max_pool2d"]


def test_forward_replaced_on_the_class_is_called(stages, monkeypatch):
    monkeypatch.setattr(nn.ReLU, "forward", lambda _self, input: input + 1)
    model = conv_relu_pool()
    torch.testing.assert_close(model(image()), F.max_pool2d(model[0](image()) + 1, 2))
    assert stages == ["max_pool2d"]


def test_child_compiled_by_itself_runs_itself(stages):
    model = conv_relu_pool()
    model[0].compile(backend="eager")
    assert_runs_as_stock(model, image())
    assert stages == ["max_pool2d"] * IMAGES


def test_parametrized_convolution_runs_fused_as_stock(stages):
    model = conv_relu_pool()
    parametrizations.weight_norm(model[0])
    assert_runs_as_stock(model, image())
    assert stages == ["conv2d_relu_max_pool2d"] * IMAGES


def test_pruned_convolution_runs_as_stock(stages):
    model = conv_relu_pool()
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    assert_runs_as_stock(model, image())
    assert stages == ["max_pool2d"] * IMAGES


def test_lazy_convolution_takes_its_shape_then_fuses(stages):
    model = fastcnn.nn.Sequential(nn.LazyConv2d(4, 3), nn.ReLU())
    model(image())
    assert model[0].in_channels == 3
    assert stages == []
    model(image())
    assert stages == ["conv2d_relu"]


IN_PLACE_CASES = {
    "after conv": [conv(), nn.ReLU(inplace=True), nn.MaxPool2d(2)],
    "after pool": [nn.MaxPool2d(2), nn.ReLU(inplace=True)],
    "after conv relu pool": [conv(), nn.ReLU(), nn.MaxPool2d(2), nn.ReLU(inplace=True)],
    "after lrn": [nn.LocalResponseNorm(3), nn.ReLU(inplace=True)],
    "after lrn pool": [nn.LocalResponseNorm(3), nn.MaxPool2d(2), nn.ReLU(inplace=True)],
    "after linear": [nn.Flatten(), nn.Linear(243, 5), nn.ReLU(inplace=True), nn.Linear(5, 2)],
}


@pytest.mark.parametrize("case", IN_PLACE_CASES)
def test_in_place_relu_shows_nowhere(case):
    x = image()
    assert_runs_as_stock(fastcnn.nn.Sequential(*IN_PLACE_CASES[case]), x)
    assert torch.equal(x, image())


def test_in_place_relu_at_the_front_changes_the_input_as_stock():
    x = image()
    fastcnn.nn.Sequential(nn.ReLU(inplace=True), conv(), nn.ReLU())(x)
    assert torch.equal(x, F.relu(image()))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_independent_and_fused(duplicate, stages):
    model = conv_relu_pool()
    copied = duplicate(model)
    torch.testing.assert_close(copied(image()), model(image()))
    assert type(copied) is fastcnn.nn.Sequential
    assert copied[0].weight is not model[0].weight
    assert stages == ["conv2d_relu_max_pool2d"] * 2


def test_functional_call_uses_the_parameters_given(stages):
    model = conv_relu_pool()
    zeros = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    assert torch.func.functional_call(model, zeros, image()).eq(0).all()
    assert stages == ["conv2d_relu_max_pool2d"]


LAYER_CASES = {
    "max pool": (fastcnn.nn.MaxPool2d(3, 2, 1, ceil_mode=True), nn.MaxPool2d(3, 2, 1, ceil_mode=True)),
    "lrn": (fastcnn.nn.LocalResponseNorm(2, 0.1, 0.5, 2.0), nn.LocalResponseNorm(2, 0.1, 0.5, 2.0)),
}


@pytest.mark.parametrize("case", LAYER_CASES)
def test_layer_equals_its_stock_twin(case, stages):
    ours, stock = LAYER_CASES[case]
    assert str(ours) == str(stock)
    for actual, expected in zip(output_and_gradients(ours, image()), output_and_gradients(stock, image()), strict=True):
        torch.testing.assert_close(actual, expected)
    assert len(stages) == 1


def test_max_pool_layer_returns_torch_indices():
    values, indices = fastcnn.nn.MaxPool2d(2, return_indices=True)(image())
    expected_values, expected_indices = nn.MaxPool2d(2, return_indices=True)(image())
    assert torch.equal(values, expected_values)
    assert torch.equal(indices, expected_indices)


CONV_CASES = {
    "defaults": {},
    "every setting": {"stride": 2, "padding": (2, 1), "dilation": 2, "groups": 3, "bias": False},
    "padding same": {"padding": "same"},
    "padding mode circular": {"padding": 1, "padding_mode": "circular"},
}


@pytest.mark.parametrize("case", CONV_CASES)
def test_conv_relu_layer_equals_stock(case, stages):
    ours = fastcnn.nn.ConvReLU2d(3, 6, 3, **CONV_CASES[case])
    stock = nn.Sequential(nn.Conv2d(3, 6, 3, **CONV_CASES[case]), nn.ReLU())
    stock[0].load_state_dict(ours.state_dict())
    for actual, expected in zip(output_and_gradients(ours, image()), output_and_gradients(stock, image()), strict=True):
        torch.testing.assert_close(actual, expected)
    assert stages == ["conv2d_relu"]


@pytest.mark.parametrize("case", CONV_CASES)
def test_conv_relu_max_pool_layer_equals_stock(case, stages):
    ours = fastcnn.nn.ConvReLUMaxPool2d(
        3, 6, 3, **CONV_CASES[case], pool_size=3, pool_stride=2, pool_padding=1, pool_ceil_mode=True
    )
    stock = nn.Sequential(nn.Conv2d(3, 6, 3, **CONV_CASES[case]), nn.ReLU(), nn.MaxPool2d(3, 2, 1, ceil_mode=True))
    stock[0].load_state_dict(ours.state_dict())
    for actual, expected in zip(output_and_gradients(ours, image()), output_and_gradients(stock, image()), strict=True):
        torch.testing.assert_close(actual, expected)
    assert stages == ["conv2d_relu_max_pool2d"]


def test_conv_relu_max_pool_layer_steps_by_its_window_and_says_so():
    layer = fastcnn.nn.ConvReLUMaxPool2d(3, 4, 3, pool_size=2)
    assert layer(image()).shape == (2, 4, 3, 3)
    assert "pool_size=2, pool_stride=2, pool_padding=0, pool_ceil_mode=False" in str(layer)
    with pytest.raises(TypeError, match="pool_size"):
        fastcnn.nn.ConvReLUMaxPool2d(3, 4, 3)


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
def test_layers_are_scripted_as_stock_ones():
    layers = fastcnn.nn.ConvReLUMaxPool2d(3, 4, 2, pool_size=2), fastcnn.nn.LocalResponseNorm(3)
    model = fastcnn.nn.Sequential(*layers, fastcnn.nn.ConvReLU2d(4, 4, 1), fastcnn.nn.MaxPool2d(2), nn.Flatten())
    scripted = torch.jit.script(model)
    torch.testing.assert_close(scripted(image()), model(image()))
    assert "fastcnn::" not in str(scripted.inlined_graph)


@pytest.mark.parametrize(
    "layer",
    [
        fastcnn.nn.MaxPool2d(2),
        fastcnn.nn.LocalResponseNorm(3),
        fastcnn.nn.ConvReLU2d(3, 4, 3),
        fastcnn.nn.ConvReLUMaxPool2d(3, 4, 3, pool_size=2),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_layers_pickle_and_trace(layer):
    expected = layer(image())
    torch.testing.assert_close(pickle.loads(pickle.dumps(layer))(image()), expected)
    torch.testing.assert_close(torch.fx.symbolic_trace(nn.Sequential(layer))(image()), expected)
