"""What the public functions choose for themselves, forced: every tile of the implicit GEMM, and 64-bit offsets."""

import pytest
import torch
import torch.nn.functional as F
from parity import DEVICE, FORMATS, assert_parity, each_dtype, each_format, last_place, new

import fastcnn
import fastcnn.functional as FF
from fastcnn.shapes import Window
from fastcnn.triton import conv_relu, tiles


@each_dtype
@pytest.mark.parametrize("config", conv_relu.CONFIGS, ids=str)
@pytest.mark.parametrize("groups", [1, 2])
def test_every_tile_of_the_implicit_gemm(groups: int, config: conv_relu.Config, dtype: torch.dtype) -> None:
    format = FORMATS["channels_last"] if groups == 1 else FORMATS["nchw"]
    x = new(3, 10, 7, 6, dtype=dtype, format=format)
    weight = new(22, 10 // groups, 3, 2, dtype=dtype, format=format) / 8
    bias = new(22, dtype=dtype)
    window = Window((3, 2), (2, 1), (1, 1), (1, 2), False)
    ours = conv_relu.implicit_gemm(x, weight, bias, window, groups, relu=True, config=config)
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
            assert conv_relu.dot_precision(torch.float32) == setting
        convolutions.fp32_precision = "tf32"
        assert conv_relu.dot_precision(torch.bfloat16) == "ieee"  # only float32 has the choice
    finally:
        convolutions.fp32_precision = before
