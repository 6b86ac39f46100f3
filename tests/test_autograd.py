"""Derivatives of every function under Triton's kernels: of any order, for any input, and what forward keeps."""

import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
from parity import COMPILED
from stages import (
    DEVICE,
    IMAGE,
    STAGES,
    WITH_PARAMETERS,
    Stage,
    assert_equal_but_rounding,
    both,
    each_stage,
    each_stage_with_parameters,
    kernels_in_float32,
    loss_of,
    randn,
)
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import fastcnn
import fastcnn.functional as FF
from fastcnn import front


@pytest.fixture(autouse=True)
def _kernels():
    with kernels_in_float32():
        yield


def _norm(function):
    return lambda x, w, b: function(x, None, None, w, b, training=True)


def _stock_norm(x, _, __, w, b, training):
    return F.relu(F.batch_norm(x, None, None, w, b, training))


MORE = {
    "add_relu": Stage(lambda x, y: FF.add_relu(x, y), lambda x, y: F.relu(x + y), IMAGE, IMAGE),
    "batch_norm_relu": Stage(_norm(FF.batch_norm_relu), _norm(_stock_norm), IMAGE, (6,), (6,)),
    "batch_norm_relu_max_pool2d": Stage(
        _norm(functools.partial(FF.batch_norm_relu_max_pool2d, pool_size=2)),
        lambda *tensors: F.max_pool2d(_norm(_stock_norm)(*tensors), 2),
        *(IMAGE, (6,), (6,)),
    ),
}


FUNCTIONS = ("ConvReLU", "ConvReLUPool", "LinearReLU", "LocalResponseNorm", "LRNPool", "MaxPoolBackward")


def has_kernel_gradient(output):
    """Whether autograd leads through a node of ours, so that a test does not compare stock with stock."""
    nodes, seen = [output.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [parent for parent, _ in node.next_functions]
    return any(each in node.name() for node in seen for each in FUNCTIONS)


@each_stage
def test_first_derivatives_go_through_kernels_and_equal_stock(stage):
    assert has_kernel_gradient(stage.ours(*stage.tensors()))
    assert_equal_but_rounding(*both(stage, lambda loss, tensors: torch.autograd.grad(loss(*tensors), tensors)))


@each_stage
def test_a_plain_call_takes_the_cheap_function(stage):
    """One whose forward takes the context: torch reads the other kind's signature at every call."""
    with front.aside():
        function = stage.ours(*stage.tensors()).grad_fn._forward_cls
    assert function.setup_context is torch.autograd.Function.setup_context
    assert function.__name__ in ("ConvReLU", "ConvReLUPool", "LinearReLU", "LocalResponseNorm", "LRNPool", "MaxPool")


@each_stage
def test_gradient_penalty(stage):
    def penalty(loss, tensors):
        gradients = torch.autograd.grad(loss(*tensors), tensors, create_graph=True)
        return torch.autograd.grad(sum(gradient.square().sum() for gradient in gradients), tensors)

    assert_equal_but_rounding(*both(stage, penalty))


@each_stage
def test_penalty_on_the_input_alone(stage):
    def penalty(loss, tensors):
        (gradient,) = torch.autograd.grad(loss(*tensors), tensors[0], create_graph=True)
        (gradient.norm() - 1).square().backward()
        return [tensor.grad for tensor in tensors if tensor.grad is not None]

    assert_equal_but_rounding(*both(stage, penalty))


def alone(function, tensors):
    """Return the gradients that a penalty on the input's gradient gives every tensor, the input among them."""
    (gradient,) = torch.autograd.grad(function(*tensors).sum(), tensors[0], create_graph=True)
    if gradient.requires_grad:
        gradient.square().sum().backward()
    return [tensor.grad for tensor in tensors]


@pytest.mark.parametrize("backend", ["auto", "triton", *(name for name, _ in COMPILED)])
@pytest.mark.parametrize("name", [*STAGES, *MORE])
def test_penalty_gives_gradients_of_zero_where_stock_does(name, backend):
    stage = {**STAGES, **MORE}[name]
    with fastcnn.use_backend(backend):
        actual = alone(stage.ours, stage.tensors())
    expected = alone(stage.stock, stage.tensors())
    assert [each is None for each in actual] == [each is None for each in expected]
    for mine, theirs in zip(actual, expected):
        if theirs is not None:
            assert_equal_but_rounding(mine, theirs)


def test_penalty_on_the_gradient_of_one_parameter():
    """The input of the stage wants no gradient, as that of a network's first layer."""
    stage = STAGES["conv2d_relu_max_pool2d"]

    def gradients(function):
        image, weight, bias = stage.tensors()
        image.requires_grad_(False)
        (gradient,) = torch.autograd.grad(function(image, weight, bias).sum(), weight, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), [weight, bias])

    assert_equal_but_rounding(gradients(stage.ours), gradients(stage.stock))


@each_stage
def test_third_derivative(stage):
    def third(loss, tensors):
        value = loss(*tensors)
        for _ in range(3):
            (gradient,) = torch.autograd.grad(value, tensors[0], create_graph=True)
            value = gradient.square().sum()
        return value

    assert_equal_but_rounding(*both(stage, third))


@each_stage
def test_batched_gradients(stage):
    def jacobian(function):
        tensors = stage.tensors()
        output = function(*tensors)
        return torch.autograd.grad(output, tensors, randn(2, *output.shape, seed=9), is_grads_batched=True)

    assert_equal_but_rounding(jacobian(stage.ours), jacobian(stage.stock))


@each_stage_with_parameters
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("needs", list(itertools.product([True, False], repeat=3)), ids=str)
def test_only_what_requires_a_gradient_gets_one(stage, needs, with_bias):
    def gradients(function):
        tensors = stage.tensors(requires_grad=False)
        for tensor, need in zip(tensors, needs, strict=True):
            tensor.requires_grad_(need)
        output = function(*tensors[: 3 if with_bias else 2])
        needed = any(needs[: 3 if with_bias else 2])
        assert output.requires_grad == needed
        if needed:
            output.square().sum().backward()
        return [tensor.grad for tensor in tensors]

    actual, expected = gradients(stage.ours), gradients(stage.stock)
    assert [gradient is None for gradient in actual] == [gradient is None for gradient in expected]
    assert_equal_but_rounding([g for g in actual if g is not None], [g for g in expected if g is not None])


@each_stage
def test_no_grad_gives_an_output_without_history(stage):
    with torch.no_grad():
        output = stage.ours(*stage.tensors())
    assert not output.requires_grad
    assert output.grad_fn is None
    torch.testing.assert_close(output, stage.ours(*stage.tensors()).detach(), rtol=0, atol=0)


@each_stage
def test_inference_mode(stage):
    expected = stage.ours(*stage.tensors(False))
    with torch.inference_mode():
        output = stage.ours(*stage.tensors())
        assert output.is_inference()
        torch.testing.assert_close(output, expected, rtol=0, atol=0)


@each_stage
def test_retained_graph_gives_the_same_gradient_again(stage):
    tensors = stage.tensors()
    loss = loss_of(stage.ours)(*tensors)
    first = torch.autograd.grad(loss, tensors, retain_graph=True)
    second = torch.autograd.grad(loss, tensors)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, tensors)


@each_stage
def test_unused_output_costs_nothing(stage):
    tensors = stage.tensors()
    stage.ours(*tensors)
    (tensors[0] * 3).sum().backward()
    assert torch.equal(tensors[0].grad, torch.full_like(tensors[0], 3))
    assert all(tensor.grad is None for tensor in tensors[1:])


@each_stage
def test_gradient_that_is_expanded_or_strided(stage):
    tensors = stage.tensors()
    output, expected = stage.ours(*tensors), stage.stock(*tensors)
    expanded = torch.ones((), device=DEVICE).expand(output.shape)
    strided = randn(*output.shape[:-1], 2 * output.shape[-1])[..., ::2]
    for gradient in (expanded, strided):
        actual = torch.autograd.grad(output, tensors, gradient, retain_graph=True)
        assert_equal_but_rounding(actual, torch.autograd.grad(expected, tensors, gradient, retain_graph=True))


@pytest.mark.parametrize("name", [name for name in STAGES if name != "max_pool2d"])
def test_changing_the_kept_input_before_backward_is_an_error(name):
    image, *rest = STAGES[name].tensors()
    image = image.clone()
    output = STAGES[name].ours(image, *rest)
    with torch.no_grad():
        image.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_input_that_is_not_kept_may_change_before_backward():
    (leaf,) = STAGES["max_pool2d"].tensors()
    (expected,) = torch.autograd.grad(STAGES["max_pool2d"].stock(leaf).square().sum(), leaf)
    image = leaf.clone()
    output = STAGES["max_pool2d"].ours(image)
    with torch.no_grad():
        image.neg_()
    assert_equal_but_rounding(torch.autograd.grad(output.square().sum(), leaf), (expected,))


@pytest.mark.parametrize("name", ["conv2d_relu", "linear_relu"])
def test_changing_the_output_that_is_the_mask_is_an_error(name):
    tensors = STAGES[name].tensors()
    output = STAGES[name].ours(*tensors)
    output.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@pytest.mark.parametrize("name", ["max_pool2d", "conv2d_relu_max_pool2d", "local_response_norm_max_pool2d"])
def test_pooled_output_may_be_changed_in_place(name):
    def gradients(function):
        tensors = STAGES[name].tensors()
        output = function(*tensors)
        output.mul_(2).add_(1)
        return torch.autograd.grad(output.square().sum(), tensors)

    assert_equal_but_rounding(gradients(STAGES[name].ours), gradients(STAGES[name].stock))


@each_stage
def test_checkpointing(stage):
    plain = torch.autograd.grad(loss_of(stage.ours)(*(tensors := stage.tensors())), tensors)
    tensors = stage.tensors()
    output = checkpoint(stage.ours, *tensors, use_reentrant=False)
    again = torch.autograd.grad(loss_of(lambda: output)(), tensors)
    torch.testing.assert_close(again, plain, rtol=0, atol=0)


def test_indices_carry_no_gradient():
    pooled, indices = FF.max_pool2d(randn(*IMAGE).requires_grad_(), 3, 2, return_indices=True)
    assert pooled.requires_grad
    assert not indices.requires_grad


def kept_by(call):
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        output = call()
    return output, kept


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("conv2d_relu", ["input", "output", "weight"]),
        ("conv2d_relu_max_pool2d", ["codes", "input", "weight"]),
        ("max_pool2d", ["codes"]),
        ("local_response_norm", ["input"]),
        ("local_response_norm_max_pool2d", ["codes", "input"]),
        ("linear_relu", ["input", "output", "weight"]),
    ],
)
def test_forward_keeps_the_least(name, expected):
    tensors = STAGES[name].tensors()
    output, kept = kept_by(lambda: STAGES[name].ours(*tensors))
    named = dict(zip(("input", "weight", "bias"), tensors)) | {"output": output}
    assert sorted(role(tensor, named) for tensor in kept if tensor.numel()) == expected


@each_stage_with_parameters
@pytest.mark.parametrize("backend", ["triton", *(name for name, _ in COMPILED)])
@pytest.mark.parametrize("needs", list(itertools.product([True, False], repeat=3))[:-1], ids=str)
def test_keeps_no_operand_that_stock_does_not_keep(stage, needs, backend):
    def operands_kept(function):
        tensors = stage.tensors(requires_grad=False)
        for tensor, need in zip(tensors, needs):
            tensor.requires_grad_(need)
        addresses = {tensor.data_ptr(): name for tensor, name in zip(tensors, ("input", "weight", "bias"))}
        _, kept = kept_by(lambda: function(*tensors))
        return {addresses[each.data_ptr()] for each in kept if each.data_ptr() in addresses}

    with fastcnn.use_backend(backend):
        assert operands_kept(stage.ours) <= operands_kept(stage.stock)


def test_training_a_vgg_keeps_little_more_than_half_of_what_stock_keeps():
    model = fastcnn.vgg16(cifar=True)
    parameters = {parameter.data_ptr() for parameter in model.parameters()}

    def bytes_kept(network):
        image = torch.randn(1, 3, 32, 32, device=DEVICE)
        _, kept = kept_by(lambda: network(image))
        storages = {tensor.data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
        return sum(size for address, size in storages.items() if address not in parameters)

    backend, _ = COMPILED[0] if COMPILED else ("triton", None)
    with fastcnn.use_backend(backend):
        assert bytes_kept(model) < 0.55 * bytes_kept(fastcnn.unfuse(model))


def role(kept, named):
    """Name a kept tensor: the very memory of one of these, or one byte for each value of the output."""
    if kept.dtype == torch.uint8 and kept.shape == named["output"].shape:
        return "codes"
    return next((name for name, tensor in named.items() if tensor.data_ptr() == kept.data_ptr()), repr(kept))


@each_stage
@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_autocast_dtypes(stage, backend):
    narrow = stage in [STAGES[name] for name in WITH_PARAMETERS]
    tensors = stage.tensors()
    with fastcnn.use_backend(backend), torch.autocast(DEVICE, torch.bfloat16):
        output = stage.ours(*tensors)
        of_bfloat16 = stage.ours(*[tensor.detach().bfloat16() for tensor in tensors])
    assert output.dtype == (torch.bfloat16 if narrow else torch.float32)
    assert of_bfloat16.dtype == torch.bfloat16
    gradients = torch.autograd.grad(output.float().sum(), tensors)
    assert {gradient.dtype for gradient in gradients} == {torch.float32}


@each_stage
def test_autocast_values_equal_stock_in_bfloat16(stage):
    def run(function):
        tensors = stage.tensors()
        with torch.autocast(DEVICE, torch.bfloat16):
            output = function(*tensors)
        return output.float(), torch.autograd.grad(output.float().sum(), tensors)

    actual, expected = run(stage.ours), run(stage.stock)
    torch.testing.assert_close(actual, expected, rtol=2**-6, atol=2**-6 * 8)  # two roundings of values of up to eight


@each_stage
def test_autocast_leaves_float64_alone(stage):
    with fastcnn.use_backend("auto"), torch.autocast(DEVICE, torch.bfloat16):
        output = stage.ours(*[tensor.double() for tensor in stage.tensors(False)])
    assert output.dtype == torch.float64


def test_autocast_accepts_mixed_dtypes():
    image, weight, bias = STAGES["conv2d_relu"].tensors()
    with torch.autocast(DEVICE, torch.bfloat16):
        output = FF.conv2d_relu(image.bfloat16(), weight, bias)
    assert output.dtype == torch.bfloat16


@each_stage
def test_two_runs_are_bitwise_equal(stage, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)  # the convolutions are torch's

    def run():
        tensors = stage.tensors()
        output = stage.ours(*tensors)
        return output, *torch.autograd.grad(output.square().sum(), tensors)

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)
