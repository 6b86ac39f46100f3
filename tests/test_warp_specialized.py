"""The warp-specialized convolution in Gluon, played on the CPU from its own source; on a Hopper GPU, the real one.

No GPU has run it yet.
"""

from typing import Any

import pytest
import test_conv_relu as plain
import test_conv_relu_pool as pooled
import torch
import torch.nn.functional as F
from parity import DEVICE, FORMATS, assert_parity, assert_same, each_case, mostly_sweep, specials
from played_gluon import Descriptor, PlayedKernel
from test_tma import BFLOAT16, CASES, FLOAT16, POOLED, TWO_BY_TWO, force, one_product_a_pixel

import fastcnn
import fastcnn.functional as FF
from fastcnn.shapes import Window
from fastcnn.triton.convolution import hopper, warp_specialized
from fastcnn.triton.convolution.hopper import BOXES, WARP_SPECIALIZED, Config

pytestmark = pytest.mark.skipif(
    DEVICE == "cuda" and torch.cuda.get_device_capability() != (9, 0),
    reason="needs a GPU of compute capability 9.0",
)

BACKEND = ("triton", "warp_specialized")


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Play the kernel where there is no GPU, with three programs, so that each goes over several tiles."""
    if DEVICE == "cuda":
        return warp_specialized.warp_specialized_kernel
    played = PlayedKernel()
    monkeypatch.setattr(warp_specialized, "warp_specialized_kernel", played)
    monkeypatch.setattr(warp_specialized, "descriptor", lambda boxed: boxed and Descriptor(boxed))
    monkeypatch.setattr(hopper, "_capability", lambda device: (9, 0))
    monkeypatch.setattr(hopper, "multiprocessors", lambda device: 3)
    return played


@each_case(CASES)
def test_parity(case: Any, kernel: Any) -> None:
    input, weight, settings, dtype, format = case
    assert_parity(*plain.both(**settings), plain.tensors(input, weight, dtype, FORMATS[format]), BACKEND)
    assert DEVICE == "cuda" or kernel.launches == (input[0] > 0)


@each_case(POOLED)
def test_pooled_parity(case: Any, kernel: Any) -> None:
    input, weight, settings, dtype, format, pool = case
    given = plain.tensors(input, weight, dtype, FORMATS[format])
    whole = tuple(torch.randint_like(t, -2, 3) for t in given)  # exact: one winner is right
    assert_parity(*pooled.both(settings, pool), whole, BACKEND)


@pytest.mark.parametrize("config", mostly_sweep(WARP_SPECIALIZED, 1), ids=str)
@pytest.mark.parametrize("pool", [False, True], ids=["plain", "pooled"])
def test_every_configuration_and_box(pool: bool, config: Config, kernel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randint(-2, 3, (config.block_m + 16, 136, 2, 1), device=DEVICE).to(BFLOAT16)
    bias = torch.randint(-9, 9, (config.block_m + 16,), device=DEVICE).to(BFLOAT16)
    window = Window((2, 1), (1, 1), (1, 0), (1, 1), False)
    for box in BOXES[config.block_n]:
        if pool and not box.fits_pairs():
            continue
        force(box, monkeypatch)
        x = torch.randint(-2, 3, (box.images + 1, 136, box.rows + 1, 2), device=DEVICE).to(BFLOAT16)
        x = x.to(memory_format=torch.channels_last)
        y, _ = warp_specialized.convolution(x, weight, bias, window, 1, f":{config.name}", pool=pool)
        exact = F.conv2d(x.float(), weight.float(), bias.float(), padding=(1, 0)).to(BFLOAT16)
        torch.testing.assert_close(y, F.max_pool2d(F.relu(exact), 2) if pool else exact, rtol=0, atol=0)


def test_special_values_go_through_as_in_torch(kernel: Any) -> None:
    given = one_product_a_pixel(specials(2, 1, 18, 12, dtype=BFLOAT16))
    assert_same(*pooled.both({}, TWO_BY_TWO), given, BACKEND)
    assert_same(*plain.both(), given, BACKEND)


def test_codes_are_those_of_the_other_algorithms(kernel: Any) -> None:
    x, weight, bias = one_product_a_pixel(specials(3, 1, 20, 14, dtype=FLOAT16))
    operator = torch.ops.fastcnn.conv_relu_pool_codes.triton
    convolution, window = [1, 1, 0, 0, 1, 1, 1], [2, 2, 2, 2, 0, 0, 1, 1, 0]
    (y, codes), (other, other_codes) = (
        operator(x, weight, bias, convolution, algorithm, window) for algorithm in (BACKEND[1], "epilogue")
    )
    torch.testing.assert_close(y, other, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(codes, other_codes)


@pytest.mark.parametrize(
    ("capability", "got"), [((8, 0), "8.0"), ((10, 0), "10.0"), ((0, 0), DEVICE)], ids=["8.0", "10.0", "none"]
)
def test_other_devices_are_refused(capability: tuple[int, int], got: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper, "_capability", lambda device: capability)
    expected = f"'warp_specialized' takes argument 'input' on a GPU of compute capability 9.x, got {got}"
    x, w = (torch.zeros(16, 8, 1, 1, dtype=BFLOAT16, device=DEVICE) for _ in range(2))
    with fastcnn.use_backend("triton", algorithm="warp_specialized"), pytest.raises(RuntimeError, match=expected):
        FF.conv2d_relu(x, w)
