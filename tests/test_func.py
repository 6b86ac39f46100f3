"""torch.func over every function: grad, vmap, jacrev and functional_call under kernels, forward-mode under auto."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from stages import (
    DEVICE,
    IMAGE,
    STAGES,
    assert_equal_but_rounding,
    both,
    each_stage,
    each_stage_with_parameters,
    kernels_in_float32,
    loss_of,
    randn,
)

import fastcnn
import fastcnn.functional as FF


@pytest.fixture(autouse=True)
def _kernels():
    with kernels_in_float32():
        yield


@each_stage
def test_func_grad(stage):
    everything = tuple(range(len(stage.shapes)))
    assert_equal_but_rounding(*both(stage, lambda loss, tensors: torch.func.grad(loss, everything)(*tensors)))


@each_stage
def test_func_grad_of_grad(stage):
    def second(loss, tensors):
        return torch.func.grad(lambda *t: torch.func.grad(loss)(*t).square().sum())(*tensors)

    assert_equal_but_rounding(*both(stage, second))


@each_stage
def test_func_jacrev(stage):
    image, *rest = stage.tensors(requires_grad=False)
    actual = torch.func.jacrev(stage.ours)(image[:1], *rest)
    assert_equal_but_rounding(actual, torch.func.jacrev(stage.stock)(image[:1], *rest))


@each_stage
def test_func_jacrev_of_jacrev(stage):
    def hessian(loss, tensors):
        image, *rest = tensors
        return torch.func.jacrev(torch.func.jacrev(loss))(image[:1, :3] if not rest else image[:1, :], *rest)

    assert_equal_but_rounding(*both(stage, hessian))


@each_stage
def test_func_vjp(stage):
    def pull(function):
        output, pullback = torch.func.vjp(function, *stage.tensors(requires_grad=False))
        return output, pullback(randn(*output.shape, seed=9))

    assert_equal_but_rounding(pull(stage.ours), pull(stage.stock))


@each_stage
@pytest.mark.parametrize("in_dim", [0, 1, -1])
def test_vmap_over_inputs(stage, in_dim):
    images = torch.stack([stage.tensors(False)[0], randn(*stage.shapes[0], seed=7)], in_dim)
    rest = stage.tensors(requires_grad=False)[1:]
    actual = torch.vmap(lambda x: stage.ours(x, *rest), in_dims=in_dim)(images)
    expected = torch.stack([stage.stock(x, *rest) for x in images.unbind(in_dim)])
    assert_equal_but_rounding(actual, expected)


@each_stage
def test_vmap_within_vmap(stage):
    images = torch.stack([randn(2, *stage.shapes[0], seed=7), randn(2, *stage.shapes[0], seed=8)])
    rest = stage.tensors(requires_grad=False)[1:]
    actual = torch.vmap(torch.vmap(lambda x: stage.ours(x, *rest)))(images)
    expected = torch.stack([torch.stack([stage.stock(x, *rest) for x in row]) for row in images])
    assert_equal_but_rounding(actual, expected)


@each_stage_with_parameters
@pytest.mark.parametrize("in_dims", [(None, 0, None), (0, 0, 0), (None, None, 0), (0, 1, None)])
def test_vmap_over_parameters(stage, in_dims):
    stacked = [
        tensor if dim is None else torch.stack([tensor, tensor * 2 - 1], dim)
        for tensor, dim in zip(stage.tensors(requires_grad=False), in_dims, strict=True)
    ]
    slices = [
        [tensor if dim is None else tensor.select(dim, i) for tensor, dim in zip(stacked, in_dims, strict=True)]
        for i in range(2)
    ]
    actual = torch.vmap(stage.ours, in_dims=in_dims)(*stacked)
    assert_equal_but_rounding(actual, torch.stack([stage.stock(*tensors) for tensors in slices]))


@each_stage
def test_per_sample_gradients(stage):
    assert_per_sample_gradients(stage, lambda images: images[:, None])


@pytest.mark.parametrize("name", [name for name in STAGES if name != "local_response_norm_max_pool2d"])
def test_per_sample_gradients_without_a_batch_axis(name):
    assert_per_sample_gradients(STAGES[name], lambda images: images)


def assert_per_sample_gradients(stage, samples_of):
    images, *rest = stage.tensors(requires_grad=False)
    samples = samples_of(images)
    argnums = tuple(range(len(stage.shapes)))
    per_sample = torch.func.grad(loss_of(stage.ours), argnums)
    actual = torch.vmap(per_sample, in_dims=(0, *[None] * len(rest)))(samples, *rest)
    expected = [torch.func.grad(loss_of(stage.stock), argnums)(sample, *rest) for sample in samples]
    assert_equal_but_rounding(actual, tuple(torch.stack(parts) for parts in zip(*expected, strict=True)))


def test_per_sample_gradients_of_a_module():
    layer = fastcnn.nn.ConvReLUMaxPool2d(6, 4, 3, padding=1, pool_size=2).to(DEVICE)
    parameters = dict(layer.named_parameters())
    images = randn(3, 6, 9, 7)

    def loss(parameters, image):
        return torch.func.functional_call(layer, parameters, (image,)).square().sum()

    actual = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, images)
    for i, image in enumerate(images):
        layer.zero_grad()
        with fastcnn.use_backend("torch"):
            layer(image).square().sum().backward()
        assert_equal_but_rounding([actual["weight"][i], actual["bias"][i]], [layer.weight.grad, layer.bias.grad])


def test_vmap_of_an_ensemble_of_modules():
    layers = [fastcnn.nn.ConvReLU2d(6, 4, 3).to(DEVICE) for _ in range(3)]
    parameters, buffers = torch.func.stack_module_state(layers)
    images = randn(*IMAGE)
    actual = torch.vmap(lambda p, b: torch.func.functional_call(layers[0], (p, b), (images,)))(parameters, buffers)
    with fastcnn.use_backend("torch"):
        assert_equal_but_rounding(actual, torch.stack([layer(images) for layer in layers]))


def test_vmap_over_no_parameters_says_why_it_cannot():
    with pytest.raises(RuntimeError, match="slice by slice: expected at least one slice, got 0"):
        torch.vmap(FF.conv2d_relu)(randn(0, 2, 4, 6, 6), randn(0, 5, 4, 3, 3))


def test_vmap_with_indices():
    images = randn(3, *IMAGE)
    actual = torch.vmap(lambda x: FF.max_pool2d(x, 3, 2, return_indices=True))(images)
    expected = torch.vmap(lambda x: F.max_pool2d(x, 3, 2, return_indices=True))(images)
    assert_equal_but_rounding(actual[0], expected[0])
    assert torch.equal(actual[1], expected[1])


@pytest.fixture
def lent_kernels(monkeypatch):
    """Let `auto` have kernels for every op: the table of measured ones may be empty for this device."""
    stems = ("conv_relu", "conv_relu_pool", "max_pool", "lrn", "lrn_pool", "linear_relu")
    entry = importlib.import_module("fastcnn.route").Fastest("triton", (torch.float32,))
    monkeypatch.setattr("fastcnn.route.FASTEST", {(DEVICE, stem): entry for stem in stems})
    with fastcnn.use_backend("auto"):
        yield


@each_stage
def test_auto_serves_jvp(lent_kernels, stage):
    tensors = tuple(stage.tensors(requires_grad=False))
    tangents = tuple(randn(*shape, seed=9) for shape in stage.shapes)
    actual, expected = torch.func.jvp(stage.ours, tensors, tangents), torch.func.jvp(stage.stock, tensors, tangents)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@each_stage
def test_auto_serves_hessian(lent_kernels, stage):
    def hessian(function):
        image, *rest = stage.tensors(requires_grad=False)
        return torch.func.hessian(loss_of(lambda x: function(x, *rest)))(image[:1])

    torch.testing.assert_close(hessian(stage.ours), hessian(stage.stock), rtol=1e-5, atol=1e-6)


@each_stage
def test_auto_serves_dual_tensors(lent_kernels, stage):
    tensors = stage.tensors(requires_grad=False)

    def tangent(function):
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(tensors[0], randn(*stage.shapes[0], seed=9))
            return torch.autograd.forward_ad.unpack_dual(function(dual, *tensors[1:])).tangent

    torch.testing.assert_close(tangent(stage.ours), tangent(stage.stock), rtol=0, atol=0)
