"""The implicit GEMM of csrc/cuda: every tile and path that its launcher can choose, by shapes that lead there."""

from functools import partial
from typing import Any

import pytest
import test_conv_relu_pool as pooled
import torch
import torch.nn.functional as F
from parity import DEVICE, assert_parity, each_variant
from test_conv_relu import both, tensors

import fastcnn
import fastcnn.functional as FF

pytestmark = [
    pytest.mark.skipif(not fastcnn.backends()["cuda"].available, reason="needs the cuda backend"),
    pytest.mark.parametrize("backend", [("cuda", "implicit_gemm")], ids=["cuda-implicit_gemm"]),
]

# Large tiles want work for every multiprocessor; host_cuda plays a GPU that has one.
MULTIPROCESSORS = torch.cuda.get_device_properties(0).multi_processor_count if DEVICE == "cuda" else 1

# Images for each multiprocessor, their shape, weight, settings. The tiles are pixels x channels.
CASES: dict[str, tuple[int, tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "128x128, a rest of both": (1, (8, 15, 18), (120, 8, 1, 1), {}),
    "128x64, images end within a tile": (3, (16, 7, 11), (40, 16, 3, 3), {"padding": 1}),
    "64x64": (1, (24, 5, 4), (24, 24, 3, 3), {"padding": 1}),
    "64x64, element by element": (2, (5, 9, 8), (66, 5, 3, 3), {"padding": 1}),
    "128x128, several of channels": (1, (8, 12, 11), (200, 8, 1, 1), {}),
    "256x64, a rest of both": (2, (8, 13, 12), (40, 8, 3, 3), {"padding": 1}),
    "256x64, several of channels": (1, (8, 6, 5), (130, 8, 1, 1), {}),
    "channels in several slices": (1, (128, 3, 3), (8, 128, 3, 3), {"padding": 1}),
    "groups of whole chunks": (1, (32, 6, 5), (48, 16, 3, 2), {"groups": 2}),
    "groups of whole chunks, outputs not": (1, (32, 6, 5), (24, 16, 3, 1), {"groups": 2}),
    "stride, padding, dilation": (1, (8, 13, 14), (16, 8, 3, 2), {"stride": 2, "padding": (2, 1), "dilation": (2, 3)}),
    "images of one pixel": (70, (8, 1, 1), (8, 8, 3, 3), {"padding": 1}),
}
POOLED = {
    "128x128": (1, (8, 24, 14), (128, 8, 1, 1), {}),
    "256x64, odd sizes": (2, (8, 19, 17), (24, 8, 3, 3), {"padding": 1}),
    "128x64": (1, (8, 14, 10), (24, 8, 3, 3), {"padding": 1}),
    "64x64": (2, (8, 6, 4), (72, 8, 3, 3), {"padding": 1}),
    "64x64, element by element, images end within a tile": (3, (3, 10, 8), (20, 3, 3, 3), {"padding": 1}),
    "groups": (1, (16, 8, 6), (16, 8, 3, 3), {"padding": 1, "groups": 2}),
}


def given(case: Any, dtype: torch.dtype, format: torch.memory_format) -> tuple[torch.Tensor, ...]:
    """Return a case's input, weight and bias."""
    images, shape, weight, _ = case
    return tensors((images * MULTIPROCESSORS, *shape), weight, dtype, format)


@each_variant(CASES)
def test_parity(case: Any, dtype: torch.dtype, format: torch.memory_format, backend: Any) -> None:
    assert_parity(*both(**case[3]), given(case, dtype, format), backend)


@each_variant(POOLED)
def test_pooled_parity(case: Any, dtype: torch.dtype, format: torch.memory_format, backend: Any) -> None:
    whole = tuple(torch.randint_like(t, -2, 3) for t in given(case, dtype, format))  # exact: one winner is right
    assert_parity(*pooled.both(case[3], {"kernel_size": 2}), whole, backend)


@pytest.mark.parametrize("pool", [False, True], ids=["plain", "pooled"])
def test_tensors_that_are_not_aligned(pool: bool, backend: Any) -> None:
    def shifted(tensor: torch.Tensor) -> torch.Tensor:
        room = tensor.new_empty(tensor.numel() + 1)[1:].view(tensor.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2)
        return room.copy_(tensor)

    x, w, b = tensors((1, 16, 6, 6), (16, 16, 3, 3), torch.bfloat16, torch.channels_last)
    fast, plain = pooled.both({"padding": 1}, {"kernel_size": 2}) if pool else both(padding=1)
    for image, weight in ((shifted(x), w), (x, shifted(w))):
        # the bias' gradient is a sum over all winners, whichever they are
        assert_parity(partial(fast, image, weight), lambda b: plain(x.to(b), w.to(b), b), (b,), backend)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_places_of_the_winners(dtype: torch.dtype, backend: Any) -> None:
    window = torch.tensor([[1.0, 2.0, 3.0, 4.0]], device=DEVICE)
    rows = [window.roll(shift).flatten() for shift in range(4)] + [-window.flatten()]  # the last: ReLU is off
    x = torch.stack(rows).view(5, 1, 2, 2).to(dtype).requires_grad_()
    weight = torch.ones(1, 1, 1, 1, dtype=dtype, device=DEVICE)
    with fastcnn.use_backend(backend[0], algorithm=backend[1]):
        y = FF.conv2d_relu_max_pool2d(x, weight, pool_size=2)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert y.flatten().tolist() == [4, 4, 4, 4, 0]
    assert torch.equal(gradient, (x == 4).to(dtype))


@pytest.mark.parametrize("inexact", ["input", "weight"])
def test_float32_is_rounded_to_tf32_not_cut(inexact: str, backend: Any) -> None:
    values = {"input": torch.ones(1, 4, 1, 1, device=DEVICE), "weight": torch.eye(4, device=DEVICE).view(4, 4, 1, 1)}
    values[inexact] *= 1 + 2**-11
    with fastcnn.use_backend(backend[0], algorithm=backend[1]):
        y = FF.conv2d_relu(**values)
    assert y.flatten().tolist() == [1 + 2**-10] * 4


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU's memory")
def test_beyond_2_to_the_31_elements(backend: Any) -> None:
    x = torch.randn(33, 64, 1024, 1024, dtype=torch.bfloat16, device=DEVICE).to(memory_format=torch.channels_last)
    w = torch.randn(64, 64, 1, 1, dtype=torch.bfloat16, device=DEVICE) / 8
    with fastcnn.use_backend(backend[0], algorithm=backend[1]):
        y = FF.conv2d_relu(x, w)
    torch.testing.assert_close(y[-1:], F.relu(F.conv2d(x[-1:], w)))
