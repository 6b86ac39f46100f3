"""Derivatives of every function under Triton's kernels: of any order, through torch.func, and what forward keeps."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import fastcnn
import fastcnn.functional as FF

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NORM = (5, 0.5, 0.75, 2.0)  # an alpha at which the normalisation bends


@pytest.fixture(autouse=True)
def _kernels():
    with fastcnn.use_backend("triton"):
        yield


@pytest.fixture(autouse=True)
def _float32_products():
    convolutions = torch.backends.cudnn.conv
    before, convolutions.fp32_precision = convolutions.fp32_precision, "ieee"  # TF32 would hide what is compared
    yield
    convolutions.fp32_precision = before


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


class Stage:
    """A function of tensors, ours and stock, and tensors to call it on, the image first."""

    def __init__(self, ours, stock, *shapes):
        self.ours, self.stock, self.shapes = ours, stock, shapes

    def tensors(self, requires_grad=True):
        return [randn(*shape, seed=i).requires_grad_(requires_grad) for i, shape in enumerate(self.shapes)]


IMAGE, CONV = (2, 6, 9, 7), ((4, 6, 3, 3), (4,))
STAGES = {
    "conv2d_relu": Stage(
        lambda x, w, b=None: FF.conv2d_relu(x, w, b, padding=1),
        lambda x, w, b=None: F.relu(F.conv2d(x, w, b, padding=1)),
        IMAGE,
        *CONV,
    ),
    "conv2d_relu_max_pool2d": Stage(
        lambda x, w, b=None: FF.conv2d_relu_max_pool2d(x, w, b, padding=1, pool_size=3, pool_stride=2),
        lambda x, w, b=None: F.max_pool2d(F.relu(F.conv2d(x, w, b, padding=1)), 3, 2),
        IMAGE,
        *CONV,
    ),
    "max_pool2d": Stage(lambda x: FF.max_pool2d(x, 3, 2, 1), lambda x: F.max_pool2d(x, 3, 2, 1), IMAGE),
    "local_response_norm": Stage(
        lambda x: FF.local_response_norm(x, *NORM), lambda x: F.local_response_norm(x, *NORM), IMAGE
    ),
    "local_response_norm_max_pool2d": Stage(
        lambda x: FF.local_response_norm_max_pool2d(x, 3, *NORM[1:], pool_size=(2, 3), pool_stride=(2, 2)),
        lambda x: F.max_pool2d(F.local_response_norm(x, 3, *NORM[1:]), (2, 3), 2),
        IMAGE,
    ),
    "linear_relu": Stage(FF.linear_relu, lambda x, w, b=None: F.relu(F.linear(x, w, b)), (5, 7), (4, 7), (4,)),
}
WITH_PARAMETERS = ("conv2d_relu", "conv2d_relu_max_pool2d", "linear_relu")
each_stage = pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES)
each_stage_with_parameters = pytest.mark.parametrize(
    "stage", [STAGES[name] for name in WITH_PARAMETERS], ids=WITH_PARAMETERS
)


def assert_equal_but_rounding(actual, expected):
    """Compare derivatives in float32: sums of at most some hundred products, taken in another order.

    That moves a value by a few units of 2**-24 of the largest term, not of its own size: 2e-5 of the largest value
    leaves an order of magnitude for terms that cancel. A wrong factor, mask or winner shows at 1e-1.
    """
    for mine, stock in zip(torch.utils._pytree.tree_leaves(actual), torch.utils._pytree.tree_leaves(expected)):
        scale = stock.detach().abs().max().item() if stock.numel() else 0.0
        torch.testing.assert_close(mine, stock, rtol=0, atol=2e-5 * scale)


def loss_of(function):
    """Return a scalar loss of the function with a gradient that differs from place to place."""

    def loss(*tensors):
        output = function(*tensors)
        return (output.square() * torch.arange(1, output.numel() + 1, device=DEVICE).view(output.shape)).mean()

    return loss


def both(stage, derive):
    """Return what `derive` makes of the loss through our function and through stock."""
    return derive(loss_of(stage.ours), stage.tensors()), derive(loss_of(stage.stock), stage.tensors())


def has_kernel_gradient(output):
    """Whether autograd leads through a Function of ours, so that a test does not compare stock with stock."""
    nodes, seen = [output.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [parent for parent, _ in node.next_functions]
    return any(isinstance(node, torch.autograd.function.BackwardCFunction) for node in seen)


@each_stage
def test_first_derivatives_go_through_kernels_and_equal_stock(stage):
    assert has_kernel_gradient(stage.ours(*stage.tensors()))
    assert_equal_but_rounding(*both(stage, lambda loss, tensors: torch.autograd.grad(loss(*tensors), tensors)))


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


def test_vmap_with_indices():
    images = randn(3, *IMAGE)
    actual = torch.vmap(lambda x: FF.max_pool2d(x, 3, 2, return_indices=True))(images)
    expected = torch.vmap(lambda x: F.max_pool2d(x, 3, 2, return_indices=True))(images)
    assert_equal_but_rounding(actual[0], expected[0])
    assert torch.equal(actual[1], expected[1])


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
    assert sorted(role(tensor, named) for tensor in kept) == expected


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


@pytest.fixture
def lent_kernels(monkeypatch):
    """Let `auto` have kernels for every op: the table of measured ones may be empty for this device."""
    stems = ("conv_relu", "conv_relu_pool", "max_pool", "lrn", "lrn_pool", "linear_relu")
    monkeypatch.setattr("fastcnn.backend.FASTEST", {(DEVICE, stem): "triton" for stem in stems})
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
