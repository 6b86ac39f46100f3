"""What the public functions choose for themselves, forced: every tile of the implicit GEMM, and 64-bit offsets."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from parity import DEVICE, FORMATS, assert_parity, each_dtype, each_format, last_place, mostly_sweep, new

import fastcnn
import fastcnn.functional as FF
from fastcnn.shapes import Window
from fastcnn.triton import bn_relu, bn_statistics, max_pool, tiles
from fastcnn.triton.convolution import implicit_gemm


@each_dtype
@pytest.mark.parametrize("config", mostly_sweep(implicit_gemm.CONFIGS), ids=str)
@pytest.mark.parametrize("groups", [1, 2])
def test_every_tile_of_the_implicit_gemm(groups: int, config: implicit_gemm.Config, dtype: torch.dtype) -> None:
    format = FORMATS["channels_last"] if groups == 1 else FORMATS["nchw"]
    x = new(3, 10, 7, 6, dtype=dtype, format=format)
    weight = new(22, 10 // groups, 3, 2, dtype=dtype, format=format) / 8
    bias = new(22, dtype=dtype)
    window = Window((3, 2), (2, 1), (1, 1), (1, 2), False)
    ours = implicit_gemm.implicit_gemm(implicit_gemm.Convolution(x, weight, bias, window, groups, True, config))
    settings = (window.stride, window.padding, window.dilation, groups)
    exact = F.relu(F.conv2d(x.double(), weight.double(), bias.double(), *settings))
    stock = F.relu(F.conv2d(x, weight, bias, *settings))
    allowed = 2 * (stock.double() - exact).abs().max() + last_place(exact, dtype)
    assert (ours.double() - exact).abs().max() <= allowed


@each_format
def test_offsets_of_64_bits(format: torch.memory_format, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "WIDE_FROM", 1)  # as if one image had 2**31 elements
    x = new(2, 5, 7, 6, dtype=torch.float32, format=format)
    weight, bias = new(4, 5, 3, 3, dtype=torch.float32) / 6, new(4, dtype=torch.float32)

    def stock_conv(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return F.max_pool2d(F.relu(F.conv2d(x, w, b, padding=1)), 2)

    def fast_conv(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return FF.conv2d_relu_max_pool2d(x, w, b, padding=1, pool_size=2)

    for algorithm in ("epilogue", "implicit_gemm"):
        assert_parity(fast_conv, stock_conv, (x, weight, bias), ("triton", algorithm))
    norm = {"size": 3, "alpha": 2.0}
    assert_parity(
        lambda x: FF.local_response_norm_max_pool2d(x, **norm, pool_size=3, pool_stride=2),
        lambda x: F.max_pool2d(F.local_response_norm(x, **norm), 3, 2),
        (x,),
        ("triton", None),
    )
    assert_parity(
        lambda x: FF.local_response_norm(x, **norm), lambda x: F.local_response_norm(x, **norm), (x,), ("triton", None)
    )


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU with 24 GiB")
def test_more_than_2_31_elements() -> None:
    if torch.cuda.get_device_properties(0).total_memory < 24 * 2**30:
        pytest.skip("needs a GPU with 24 GiB")
    x = torch.randn(1, 64, 5800, 5800, device=DEVICE, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    assert x.numel() > 2**31
    with fastcnn.use_backend("triton"):
        ours = FF.max_pool2d(x, 2)
    torch.testing.assert_close(ours[:, :, :8], F.max_pool2d(x[:, :, :16], 2), rtol=0, atol=0)
    torch.testing.assert_close(ours[:, :, -8:], F.max_pool2d(x[:, :, -16:], 2), rtol=0, atol=0)


def test_float32_products_obey_torchs_setting() -> None:
    convolutions = torch.backends.cudnn.conv
    before = convolutions.fp32_precision
    try:
        for setting in ("tf32", "ieee"):
            convolutions.fp32_precision = setting
            assert implicit_gemm.dot_precision(torch.float32) == setting
        convolutions.fp32_precision = "tf32"
        assert implicit_gemm.dot_precision(torch.bfloat16) == "ieee"  # only float32 has the choice
    finally:
        convolutions.fp32_precision = before


@triton.jit
def rounding_kernel(x_ptr, y_ptr, COUNT: tl.constexpr):
    at = tl.arange(0, COUNT)
    tl.store(y_ptr + at, tiles.to_tf32(tl.load(x_ptr + at)))


def test_tf32_is_rounded_with_ties_away_from_zero() -> None:
    place = 2.0**-10  # the last one of TF32 beside one
    values = [1 + k * place / 4 for k in range(5)] + [-1 - place / 2, float("inf"), -float("inf"), 0.0, 3e38, 2.0**-149]
    x = torch.tensor([*values, *[float("nan")] * 5], device=DEVICE)
    x[-1:] = torch.tensor([2**31 - 1], dtype=torch.int32, device=DEVICE).view(torch.float32)  # a NaN of all ones
    y = torch.empty_like(x)
    rounding_kernel[(1,)](x, y, COUNT=16)
    wanted = [1, 1, 1 + place, 1 + place, 1 + place, -1 - place, float("inf"), -float("inf"), 0, y[9].item(), 0]
    torch.testing.assert_close(y[:11].tolist(), [float(each) for each in wanted], rtol=0, atol=0)
    assert abs(y[9].item() - 3e38) <= 3e38 * place / 2
    assert y[9].view(torch.int32) % 2**13 == 0
    assert y[11:].isnan().all()


@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter multiplies float32 as it is")
@pytest.mark.parametrize(
    ("algorithm", "inexact"),
    [
        *product(("implicit_gemm", "packed"), ("input", "weight")),
        ("epilogue+dgrad", "weight"),
        ("epilogue+wgrad", "input"),
    ],
)
def test_float32_is_rounded_to_tf32_not_cut(algorithm: str, inexact: str) -> None:
    values = {"input": torch.ones(1, 4, 1, 1, device=DEVICE), "weight": torch.eye(4, device=DEVICE).view(4, 4, 1, 1)}
    values[inexact] *= 1 + 2**-11
    x, w = (values[name].requires_grad_() for name in ("input", "weight"))
    with fastcnn.use_backend("triton", algorithm=algorithm):
        y = FF.conv2d_relu(x, w)
        dx, dw = torch.autograd.grad(y.sum(), (x, w))
    assert {"epilogue+dgrad": dx, "epilogue+wgrad": dw}.get(algorithm, y).max().item() == 1 + 2**-10


@pytest.mark.parametrize("format", [torch.channels_last, torch.contiguous_format], ids=["NHWC", "NCHW"])
def test_programs_go_over_tiles_of_several_images(format: torch.memory_format, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "PROGRAMS", 1)  # as few as there may be, so that each has many tiles
    x = torch.randn(7, 20, 9, 13, device=DEVICE).to(memory_format=format)
    window = Window((3, 3), (2, 2), (1, 1), (1, 1), False)
    leaf = x.detach().requires_grad_()
    stock = F.max_pool2d(leaf, 3, 2, 1)
    stock.backward(torch.ones_like(stock))
    pooled, codes = max_pool.max_pool_codes(x, window)
    assert pooled.equal(stock)
    assert max_pool.max_pool_backward(torch.ones_like(pooled), codes, 9, 13, window).equal(leaf.grad)
    mean, variance, _ = bn_statistics.bn_relu_statistics(x)
    torch.testing.assert_close(mean, x.mean((0, 2, 3)))
    torch.testing.assert_close(variance, x.var((0, 2, 3), unbiased=False))
    weight, bias = torch.randn(2, 20, device=DEVICE)
    leaves = [each.detach().requires_grad_() for each in (x, weight, bias)]
    output = F.batch_norm(leaves[0], None, None, *leaves[1:], training=True).relu()
    numbers = (mean, variance, weight, bias, 1e-5)
    torch.testing.assert_close(bn_relu.bn_relu(x, *numbers), output.detach())
    grad = torch.randn_like(output)
    output.backward(grad)
    for ours, each in zip(bn_relu.bn_relu_backward(grad, x, *numbers, True), leaves, strict=True):
        torch.testing.assert_close(ours, each.grad, rtol=1e-4, atol=1e-5)
