"""The convolution fed by the copy engine: parity in every configuration and box, and what is refused.

`warp_specialized` shares its plans, boxes and the arithmetic of its tiles; test_warp_specialized.py has the rest.
"""

from functools import partial
from math import prod
from typing import Any

import pytest
import test_conv_relu as plain
import test_conv_relu_pool as pooled
import torch
import torch.nn.functional as F
from parity import DEVICE, FORMATS, assert_parity, assert_same, each_case, new, specials

import fastcnn
import fastcnn.functional as FF
from fastcnn.shapes import RELU_OFF, Window
from fastcnn.triton.convolution import hopper, tma
from fastcnn.triton.convolution.hopper import BOXES, TMA, Box, Config, Output

pytestmark = pytest.mark.skipif(
    DEVICE == "cuda" and torch.cuda.get_device_capability()[0] not in tma.CAPABILITIES,
    reason="needs a GPU of compute capability 9.x or 10.x",
)

TMA_BACKEND = ("triton", "tma")
BFLOAT16, FLOAT16 = torch.bfloat16, torch.float16
TWO_BY_TWO = {"kernel_size": 2}

# input, weight, settings, dtype, layout
CASES: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any], torch.dtype, str]] = {
    "3x3, odd sizes": ((2, 8, 9, 7), (16, 8, 3, 3), {"padding": 1}, BFLOAT16, "channels_last"),
    "3x3, NCHW": ((2, 8, 9, 7), (16, 8, 3, 3), {"padding": 1}, FLOAT16, "nchw"),
    "1x1": ((3, 16, 5, 3), (32, 16, 1, 1), {}, FLOAT16, "channels_last"),
    "5x5, padding 2": ((1, 8, 6, 5), (16, 8, 5, 5), {"padding": 2}, BFLOAT16, "channels_last"),
    "several tiles along every axis": ((9, 8, 18, 10), (80, 8, 1, 1), {}, BFLOAT16, "channels_last"),
    "several chunks of channels, and a rest": (
        (1, 136, 5, 4),
        (16, 136, 3, 3),
        {"padding": 1},
        FLOAT16,
        "channels_last",
    ),
    "35 images in boxes of 8": ((35, 8, 3, 4), (16, 8, 3, 3), {"padding": 1}, FLOAT16, "channels_last"),
    "dilation, not square": (
        (2, 8, 9, 8),
        (16, 8, 3, 2),
        {"padding": (2, 1), "dilation": (2, 3)},
        BFLOAT16,
        "channels_last",
    ),
    "padding over the kernel": ((1, 8, 3, 3), (16, 8, 2, 2), {"padding": 3}, FLOAT16, "nchw"),
    "same, even kernel": ((1, 8, 6, 7), (16, 8, 2, 4), {"padding": "same"}, BFLOAT16, "channels_last"),
    "empty batch": ((0, 8, 6, 6), (16, 8, 3, 3), {"padding": 1}, BFLOAT16, "channels_last"),
}
THREE_BY_TWO = {"kernel_size": 3, "stride": 2}
# the same, and the pool
POOLED: dict[str, tuple[Any, ...]] = {
    "odd sizes leave a rest": (
        (2, 8, 9, 7),
        (16, 8, 3, 3),
        {"padding": 1},
        BFLOAT16,
        "channels_last",
        TWO_BY_TWO,
    ),
    "NCHW": ((2, 8, 8, 6), (32, 8, 3, 3), {"padding": 1}, FLOAT16, "nchw", TWO_BY_TWO),
    "several tiles along every axis": ((3, 8, 18, 18), (80, 8, 1, 1), {}, BFLOAT16, "channels_last", TWO_BY_TWO),
    "5x5, padding 2": ((1, 8, 5, 6), (16, 8, 5, 5), {"padding": 2}, FLOAT16, "channels_last", TWO_BY_TWO),
    "a pass of its own: 3x3/2": (
        (2, 8, 9, 8),
        (16, 8, 3, 3),
        {"padding": 1},
        BFLOAT16,
        "channels_last",
        THREE_BY_TWO,
    ),
    "a pass of its own: ceil_mode": (
        (1, 8, 7, 9),
        (16, 8, 3, 3),
        {"padding": 1},
        FLOAT16,
        "channels_last",
        TWO_BY_TWO | {"ceil_mode": True},
    ),
    "ceil_mode without a rest": (
        (1, 8, 6, 8),
        (16, 8, 3, 3),
        {"padding": 1},
        BFLOAT16,
        "nchw",
        TWO_BY_TWO | {"ceil_mode": True},
    ),
    "empty batch": ((0, 8, 6, 6), (16, 8, 3, 3), {"padding": 1}, FLOAT16, "channels_last", TWO_BY_TWO),
}


@each_case(CASES)
def test_parity(case: Any) -> None:
    input, weight, settings, dtype, format = case
    assert_parity(*plain.both(**settings), plain.tensors(input, weight, dtype, FORMATS[format]), TMA_BACKEND)


@each_case(POOLED)
def test_pooled_parity(case: Any) -> None:
    input, weight, settings, dtype, format, pool = case
    given = plain.tensors(input, weight, dtype, FORMATS[format])
    whole = tuple(torch.randint_like(t, -2, 3) for t in given)  # exact: one winner is right
    assert_parity(*pooled.both(settings, pool), whole, TMA_BACKEND)


@pytest.mark.parametrize("pool", [False, True], ids=["plain", "pooled"])
def test_without_bias(pool: bool) -> None:
    x, w, _ = plain.tensors((2, 8, 6, 5), (16, 8, 3, 3), BFLOAT16, torch.channels_last)
    x, w = torch.randint_like(x, -2, 3), torch.randint_like(w, -2, 3)
    assert_parity(
        *(pooled.both({"padding": 1}, TWO_BY_TWO) if pool else plain.both(padding=1)), (x, w, None), TMA_BACKEND
    )


def test_rounding() -> None:
    x, w, b = plain.tensors((2, 24, 8, 6), (16, 24, 3, 3), BFLOAT16, torch.channels_last)
    fast, stock = pooled.both({"padding": 1}, TWO_BY_TWO)
    # the bias' gradient is a sum over all winners, whichever they are
    assert_parity(lambda b: fast(x, w, b), lambda b: stock(x.to(b), w.to(b), b), (b,), TMA_BACKEND)


def force(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every plan take this box, and the first configuration."""
    monkeypatch.setattr(
        hopper, "make_plan", lambda configs, depth, taps, output, *_: hopper.cut(configs[0], box, output)
    )


EACH_CONFIG = [(config, BOXES[config.block_n][0]) for config in TMA]
EACH_BOX = [(TMA[i], box) for i, pixels in ((2, 128), (0, 256)) for box in BOXES[pixels][1:]]


@pytest.mark.parametrize(
    ("config", "box"),
    [*EACH_CONFIG[:1], *(pytest.param(*each, marks=pytest.mark.sweep) for each in EACH_CONFIG[1:] + EACH_BOX)],
    ids=str,
)
def test_every_configuration_and_box(config: Config, box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    force(box, monkeypatch)
    images = 1 if box.images == 1 else box.images + 2
    height = box.rows + 2 if box.images == 1 else 3
    x = torch.randint(-2, 3, (images, 8, height, 2), device=DEVICE).to(BFLOAT16, memory_format=torch.channels_last)
    weight = torch.randint(-2, 3, (config.block_m + 16, 8, 2, 1), device=DEVICE).to(BFLOAT16)
    bias = torch.randint(-9, 9, (config.block_m + 16,), device=DEVICE).to(BFLOAT16)
    window = Window((2, 1), (1, 1), (1, 0), (1, 1), False)
    exact = F.conv2d(x.float(), weight.float(), bias.float(), padding=(1, 0))
    run = partial(tma.convolution, x, weight, bias, window, 1, f"tma:{config.name}")
    torch.testing.assert_close(run()[0], exact.to(BFLOAT16), rtol=0, atol=0)
    if not box.fits_pairs():
        return
    values, codes = run(pool=True, codes=True)
    expected, places = F.max_pool2d(F.relu(exact.to(BFLOAT16)).float(), 2, return_indices=True)
    code = torch.where(expected > 0, places // 2 % 2 * 2 + places % 2, RELU_OFF)
    torch.testing.assert_close(values, expected.to(BFLOAT16), rtol=0, atol=0)
    assert codes is not None
    assert torch.equal(codes, code.to(torch.uint8))


def one_product_a_pixel(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return eight channels of which the first is `x`, a weight that picks it, and a bias."""
    wide = torch.zeros(x.shape[0], 8, *x.shape[2:], dtype=x.dtype, device=DEVICE)
    wide[:, :1] = x
    weight = torch.zeros(16, 8, 1, 1, dtype=x.dtype, device=DEVICE)
    weight[:, 0] = 1
    return wide.to(memory_format=torch.channels_last), weight, torch.zeros(16, dtype=x.dtype, device=DEVICE)


@pytest.mark.parametrize("pool", [None, TWO_BY_TWO, THREE_BY_TWO], ids=["plain", "2x2/2", "3x3/2"])
def test_special_values_go_through_as_in_torch(pool: Any) -> None:
    given = one_product_a_pixel(specials(2, 1, 18, 12, dtype=BFLOAT16))
    assert_same(*(pooled.both({}, pool) if pool else plain.both()), given, TMA_BACKEND)


def test_codes_are_those_of_the_other_algorithms() -> None:
    x, weight, bias = one_product_a_pixel(specials(3, 1, 20, 14, dtype=FLOAT16))
    operator = torch.ops.fastcnn.conv_relu_pool_codes.triton
    settings = ([1, 1, 0, 0, 1, 1, 1], "{}", [2, 2, 2, 2, 0, 0, 1, 1, 0])
    (y, codes), (other, other_codes) = (
        operator(x, weight, bias, settings[0], algorithm, settings[2]) for algorithm in ("tma", "epilogue")
    )
    torch.testing.assert_close(y, other, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(codes, other_codes)
    assert set(codes.unique().tolist()) == {0, 1, 2, 3, RELU_OFF}


def test_values_that_round_to_the_same_are_equal() -> None:
    x = torch.tensor([0.25, 0.5], dtype=BFLOAT16, device=DEVICE).repeat(1, 1, 4, 4)
    x, weight, bias = one_product_a_pixel(x)
    assert_same(*pooled.both({}, TWO_BY_TWO), (x, weight, bias + 256), TMA_BACKEND)


def test_an_infinite_weight_of_one_tap_stays_there() -> None:
    x = torch.ones(1, 8, 4, 4, dtype=BFLOAT16, device=DEVICE)
    weight = torch.zeros(16, 8, 1, 2, dtype=BFLOAT16, device=DEVICE)
    weight[:, :, 0, 1] = float("inf")  # next in memory to the channels that a chunk of the first tap lacks
    with fastcnn.use_backend(*TMA_BACKEND[:1], algorithm="tma"):
        assert FF.conv2d_relu(x, weight).isposinf().all()


def test_tensors_that_are_not_aligned() -> None:
    def shifted(tensor: torch.Tensor) -> torch.Tensor:
        room = tensor.new_empty(tensor.numel() + 1)[1:].view(tensor.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2)
        return room.copy_(tensor)

    x, w, b = plain.tensors((1, 8, 6, 6), (16, 8, 3, 3), BFLOAT16, torch.channels_last)
    assert_parity(*plain.both(padding=1), (shifted(x), shifted(w), b), TMA_BACKEND)


def test_views_and_single_pixels() -> None:
    x = new(2, 16, 6, 6, dtype=BFLOAT16)[:, ::2, 1:, ::3]
    w = new(16, 8, 1, 1, dtype=BFLOAT16) / 3
    assert_parity(*plain.both(), (x, w, None), TMA_BACKEND)
    assert_parity(*plain.both(), (x[:, :, :1, :1], w, None), TMA_BACKEND)


REFUSED: dict[str, tuple[tuple[int, ...], tuple[int, ...], torch.dtype, dict[str, Any], str]] = {
    "float32": ((1, 8, 4, 4), (16, 8, 1, 1), torch.float32, {}, "'input' in bfloat16 or float16, got torch.float32"),
    "stride": ((1, 8, 4, 4), (16, 8, 1, 1), BFLOAT16, {"stride": (1, 2)}, r"'stride' 1, got \(1, 2\)"),
    "groups": ((1, 16, 4, 4), (16, 8, 1, 1), BFLOAT16, {"groups": 2}, "'groups' 1, got 2"),
    "channels": ((1, 3, 4, 4), (16, 3, 1, 1), BFLOAT16, {}, "'input' with a multiple of 8 channels, got 3"),
    "outputs": ((1, 8, 4, 4), (24, 8, 1, 1), BFLOAT16, {}, "'weight' with a multiple of 16 output channels, got 24"),
}


@each_case(REFUSED)
@pytest.mark.parametrize("pool", [False, True], ids=["plain", "pooled"])
def test_refused_by_name(pool: bool, case: Any) -> None:
    input, weight, dtype, settings, message = case
    function = partial(FF.conv2d_relu_max_pool2d, pool_size=2) if pool else FF.conv2d_relu
    x, w = torch.zeros(input, dtype=dtype, device=DEVICE), torch.zeros(weight, dtype=dtype, device=DEVICE)
    expected = f"backend 'triton' by 'tma' takes argument {message}"
    with fastcnn.use_backend("triton", algorithm="tma"), pytest.raises(RuntimeError, match=expected):
        function(x, w, **settings)


def test_other_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper, "_capability", lambda device: (8, 9))
    expected = "'tma' takes argument 'input' on a GPU of compute capability 9.x or 10.x, got 8.9"
    x, w = (torch.zeros(16, 8, 1, 1, dtype=BFLOAT16, device=DEVICE) for _ in range(2))
    with fastcnn.use_backend("triton", algorithm="tma"), pytest.raises(RuntimeError, match=expected):
        FF.conv2d_relu(x, w)


# The output, whether it is pooled, and the box.
PLANS: dict[str, tuple[Output, bool, Box]] = {
    "VGG at 224": (Output(64, 64, 224, 224), True, Box(16, 16, 1)),
    "VGG at 56": (Output(64, 256, 56, 56), True, Box(8, 4, 8)),
    "VGG at 28": (Output(64, 512, 28, 28), True, Box(4, 4, 16)),
    "VGG at 14": (Output(64, 512, 14, 14), True, Box(2, 2, 32)),
    "AlexNet at 13": (Output(128, 256, 13, 13), False, Box(1, 1, 128)),
}


@each_case(PLANS)
def test_no_lane_idles_in_the_networks(case: Any) -> None:
    output, pools, box = case
    plan = hopper.make_plan(TMA, output.channels, 9, output, pools, multiprocessors=132)
    assert plan.box == box
    assert plan.tiles * plan.config.block_m * plan.config.block_n == prod(output)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU's memory")
def test_beyond_2_to_the_31_elements() -> None:
    x = torch.randn(33, 64, 1024, 1024, dtype=BFLOAT16, device=DEVICE).to(memory_format=torch.channels_last)
    w = torch.randn(64, 64, 1, 1, dtype=BFLOAT16, device=DEVICE) / 8
    with fastcnn.use_backend("triton", algorithm="tma"):
        y = FF.conv2d_relu(x, w)
    torch.testing.assert_close(y[-1:], F.relu(F.conv2d(x[-1:], w)))
