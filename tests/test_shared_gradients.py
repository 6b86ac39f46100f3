"""What neighbouring stages of a Sequential share in backward: the ReLU's mask and the bias' gradient."""

import copy
from functools import partial
from typing import Any

import pytest
import test_conv_relu as plain
import torch
from parity import DEVICE, FORMATS, assert_parity, each_dtype, new, run
from stages import assert_equal_but_rounding
from test_gradients import OURS, Recorder
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastcnn
import fastcnn.functional as FF


def network(**settings: Any) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 5, 3, padding=1), nn.ReLU(), nn.Conv2d(5, 6, 3, padding=1, **settings), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(6, 4, 3), nn.ReLU(), nn.MaxPool2d(2)).to(DEVICE)


def image() -> torch.Tensor:
    return torch.randn(2, 3, 9, 8, generator=torch.Generator().manual_seed(1)).to(DEVICE)


def outcome(model: nn.Module, x: torch.Tensor, call: Any = None) -> list[torch.Tensor]:
    """Return the output and every gradient that there is."""
    x = x.clone().requires_grad_()
    y = (call or model)(x)
    wanted = [x, *(p for p in model.parameters() if p.requires_grad)]
    return [y.detach(), *torch.autograd.grad(y.square().sum(), wanted)]


def assert_shared(model: nn.Sequential, times: int, x: torch.Tensor | None = None, algorithm: str = OURS) -> None:
    """Assert the stock results, and in how many places a dgrad masks for the stage before."""
    x = image() if x is None else x
    with fastcnn.use_backend("triton", algorithm=algorithm), Recorder() as recorder:
        ours = outcome(fastcnn.fuse(model), x)
    assert_equal_but_rounding(ours, outcome(model, x))
    masks = [args[4] for name, args in recorder.calls if name == "fastcnn.dgrad.triton"]
    assert sum(masks) == times


@pytest.mark.parametrize("algorithm", ["epilogue+dgrad+wgrad", "epilogue+dgrad", "implicit_gemm+dgrad"])
def test_stages_share_the_mask(algorithm: str) -> None:
    assert_shared(network(), 2, algorithm=algorithm)


@each_dtype
def test_sharing_keeps_parity(dtype: torch.dtype) -> None:
    def chain(first: Any, second: Any) -> Any:
        def call(x: Any, w: Any, b: Any, v: Any, c: Any) -> torch.Tensor:
            model = nn.Sequential(nn.Conv2d(4, 5, 3, padding=1), nn.ReLU(), nn.Conv2d(5, 6, 3), nn.ReLU()).to(x)
            parameters = {"0.weight": w, "0.bias": b, "2.weight": v, "2.bias": c}
            return torch.func.functional_call(second(model), parameters, (x,))

        return call

    x, w, b = plain.tensors((2, 4, 7, 6), (5, 4, 3, 3), dtype, torch.channels_last)
    _, v, c = plain.tensors((2, 5, 7, 6), (6, 5, 3, 3), dtype, torch.channels_last)
    # whole numbers: the signs that the first ReLU leaves are the same in every dtype
    tensors = tuple(torch.randint_like(t, -2, 3) for t in (x, w, b, v, c))
    with Recorder() as recorder:
        assert_parity(chain(None, fastcnn.fuse), chain(None, lambda model: model), tensors, ("triton", OURS))
    assert any(args[4] for name, args in recorder.calls if name == "fastcnn.dgrad.triton")


def test_the_stage_before_runs_no_pass_of_its_own() -> None:
    with fastcnn.use_backend("triton", algorithm="epilogue+dgrad"), Recorder() as recorder:
        outcome(fastcnn.fuse(network()), image())
    assert recorder.count("fastcnn.conv_relu_backward.triton") == 0
    assert recorder.count("fastcnn.conv_relu_pool_backward.triton") == 1


@pytest.mark.parametrize(
    ("algorithm", "times"), [("epilogue", 0), ("epilogue+wgrad", 0), ("implicit_gemm", 0)], ids=str
)
def test_nothing_is_shared_without_our_dgrad(algorithm: str, times: int) -> None:
    assert_shared(network(), times, algorithm=algorithm)


@pytest.mark.parametrize(
    "frozen", [("0.weight", "0.bias"), ("0.bias",), ("2.weight",), ("2.weight", "2.bias")], ids=str
)
def test_frozen_parameters(frozen: tuple[str, ...]) -> None:
    model = network()
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    assert_shared(model, 2)


def test_nothing_to_hand_down_to() -> None:
    model = network()
    model[0].requires_grad_(False)
    with fastcnn.use_backend("triton", algorithm=OURS), Recorder() as recorder:
        fastcnn.fuse(model)(image()).sum().backward()
    assert recorder.count("fastcnn.dgrad.triton") == 1  # for the second stage; the first gets no gradient
    fused = [p.grad for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    model(image()).sum().backward()
    assert_equal_but_rounding(fused, [p.grad for p in model.parameters() if p.requires_grad])


@pytest.mark.parametrize(
    "settings", [{"padding_mode": "reflect"}, {"stride": 2}, {"groups": 1, "bias": False}], ids=str
)
def test_convolutions_with_settings(settings: dict[str, Any]) -> None:
    # what pads its input in a step of its own reads something else than the stage before has written
    assert_shared(network(**settings), 1 if "padding_mode" in settings else 2)


def test_an_even_same_convolution() -> None:
    model = network()
    model[2] = nn.Conv2d(5, 6, 2, padding="same").to(DEVICE)
    assert_shared(model, 1)


def test_unbatched_input() -> None:
    assert_shared(network(), 0, image()[0])


def test_a_hook_keeps_the_stages_apart() -> None:
    model = fastcnn.fuse(network())
    seen = []
    model[1].register_forward_hook(lambda *args: seen.append(args[2]))
    with fastcnn.use_backend("triton", algorithm=OURS), Recorder() as recorder:
        ours = outcome(model, image())
    assert len(seen) == 1
    assert_equal_but_rounding(ours, outcome(network(), image()))
    assert sum(args[4] for name, args in recorder.calls if name == "fastcnn.dgrad.triton") == 1


class Reads(nn.Conv2d):
    """A layer of the user's that reads its input twice."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return FF.conv2d_relu(input, self.weight, self.bias, padding=1) + input.sum()


def test_a_reader_of_the_users_own_gets_no_mask() -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), Reads(5, 4, 3)).to(DEVICE)
    assert_shared(model, 0)


def test_functions_alone_share_nothing() -> None:
    x, w, b = plain.tensors((2, 4, 6, 5), (4, 4, 3, 3), torch.float32, FORMATS["nchw"])

    def twice(conv: Any, x: Any, w: Any, b: Any) -> torch.Tensor:
        y = conv(x, w, b)
        return conv(y, w, b) + y.sum()  # a second reader of what lies between

    fast, stock = plain.both(padding=1)
    assert_parity(partial(twice, fast), partial(twice, stock), (x, w, b), ("triton", OURS))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant: bool) -> None:
    model = network()
    fused = fastcnn.fuse(copy.deepcopy(model))
    x = image().requires_grad_()
    with fastcnn.use_backend("triton", algorithm=OURS):
        checkpoint(fused, x, use_reentrant=reentrant).square().sum().backward()
    expected = outcome(model, image())
    assert_equal_but_rounding([x.grad, *(p.grad for p in fused.parameters())], expected[1:])


def test_checkpointed_pieces() -> None:
    model = network()
    fused = fastcnn.fuse(model)

    def pieces(x: torch.Tensor) -> torch.Tensor:
        return checkpoint(fused[2:], checkpoint(fused[:2], x, use_reentrant=False), use_reentrant=False)

    with fastcnn.use_backend("triton", algorithm=OURS):
        ours = outcome(fused, image(), pieces)
    assert_equal_but_rounding(ours, outcome(model, image()))


def test_gradient_penalty_through_shared_stages() -> None:
    """The second backward reads what lies between two stages too, so that its mask is no longer one stage's matter."""

    def penalty(model: nn.Module) -> Any:
        x = image().requires_grad_()
        wanted = [x, *model.parameters()]
        grads = torch.autograd.grad(model(x).square().mean(), wanted, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), wanted)

    with fastcnn.use_backend("triton", algorithm=OURS):
        assert_equal_but_rounding(penalty(fastcnn.fuse(network())), penalty(network()))


def test_a_plain_backward_and_one_that_can_be_derived_by_turns() -> None:
    with fastcnn.use_backend("triton", algorithm=OURS):
        model, x = fastcnn.fuse(network()), image().requires_grad_()
        loss = model(x).square().sum()
        wanted = [x, *model.parameters()]
        draws = [
            torch.autograd.grad(loss, wanted, retain_graph=True, create_graph=each) for each in (False, True, False)
        ]
    assert_equal_but_rounding(draws[1], draws[0])
    assert_equal_but_rounding(draws[2], draws[0])


def test_batched_gradients() -> None:
    def jacobian(model: nn.Module) -> Any:
        x = image().requires_grad_()
        y = model(x)
        several = torch.randn(2, *y.shape, generator=torch.Generator().manual_seed(2)).to(DEVICE)
        return torch.autograd.grad(y, [x, *model.parameters()], several, is_grads_batched=True)

    with fastcnn.use_backend("triton", algorithm=OURS):
        assert_equal_but_rounding(jacobian(fastcnn.fuse(network())), jacobian(network()))


def test_under_torch_func() -> None:
    def per_image(model: nn.Module) -> Any:
        parameters = dict(model.named_parameters())

        def loss(parameters: Any, x: torch.Tensor) -> torch.Tensor:
            return torch.func.functional_call(model, parameters, (x[None],)).square().sum()

        return torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, image())

    with fastcnn.use_backend("triton", algorithm=OURS):
        assert_equal_but_rounding(per_image(fastcnn.fuse(network())), per_image(network()))


def test_autocast() -> None:
    model, x = network(), image().round()
    with torch.no_grad():
        for parameter in model.parameters():  # whole numbers: no sign or winner is a matter of rounding
            parameter.copy_(torch.randint_like(parameter, -1, 2))
    with torch.autocast(DEVICE, torch.bfloat16):
        expected = outcome(model, x)
        with fastcnn.use_backend("triton", algorithm=OURS), Recorder() as recorder:
            ours = outcome(fastcnn.fuse(model), x)
    assert sum(args[4] for name, args in recorder.calls if name == "fastcnn.dgrad.triton") == 2
    for mine, stock in zip(ours, expected, strict=True):
        assert mine.dtype == stock.dtype
        assert (mine - stock).abs().max() <= 2**-4 * stock.abs().max()  # a few roundings to bfloat16 in a row


def test_compiled() -> None:
    model = network()
    fused = torch.compile(fastcnn.fuse(model), backend="aot_eager", fullgraph=True)
    with fastcnn.use_backend("triton", algorithm=OURS):
        ours = outcome(fused, image())
    assert_equal_but_rounding(ours, outcome(model, image()))


def test_a_copy_of_the_model_shares_too() -> None:
    assert_shared(copy.deepcopy(network()), 2)


def test_one_image_through_shared_weights_twice() -> None:
    conv = nn.Conv2d(4, 4, 3, padding=1).to(DEVICE)
    model = nn.Sequential(conv, nn.ReLU(), conv, nn.ReLU())
    assert_shared(model, 1, new(2, 4, 6, 5, dtype=torch.float32))


def test_run_gives_every_gradient_for_several_cotangents() -> None:
    """A graph that is kept gives the same gradients again, the sums that stages hand down among them."""
    fused, x = fastcnn.fuse(network()), image()
    with fastcnn.use_backend("triton", algorithm="epilogue+dgrad"):
        cotangent = torch.randn_like(fused(x))
        _, first = run(fused, (x,), [cotangent, cotangent])
    assert torch.equal(first[0], first[1])
