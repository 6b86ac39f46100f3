"""The convolutions' own gradients by our kernels."""

from typing import Any

import pytest
import test_conv_relu as plain
import test_conv_relu_pool as pooled
import torch
from parity import (
    DEVICE,
    FORMATS,
    assert_parity,
    assert_same,
    each_dtype,
    each_format,
    each_variant,
    mostly_sweep,
    new,
    specials,
)
from stages import assert_equal_but_rounding
from torch.utils._python_dispatch import TorchDispatchMode

import fastcnn
import fastcnn.functional as FF

OURS = "epilogue+dgrad+wgrad"
ALGORITHMS = (OURS, "epilogue+dgrad", "epilogue+wgrad")
each_algorithm = pytest.mark.parametrize("algorithm", ALGORITHMS)

CASES = {
    "3x3": plain.CASES["3x3"],
    "one channel": plain.CASES["one channel"],
    "stride, padding, dilation, not square": plain.CASES["stride, padding, dilation, not square"],
    "5x5/3 of 3 channels": ((1, 3, 13, 11), (5, 3, 5, 5), {"stride": 3, "padding": 2}),
    "groups": plain.CASES["groups"],
    "depthwise": plain.CASES["depthwise"],
    "same, even kernel": plain.CASES["same, even kernel"],
    "padding over the kernel": plain.CASES["padding over the kernel"],
    "many channels": plain.CASES["many channels"],
    "empty batch": plain.CASES["empty batch"],
    "a stride over the kernel": ((2, 3, 9, 8), (4, 3, 2, 2), {"stride": 3}),
}
POOLED = {
    "3x3, 2x2": pooled.CASES["3x3, 2x2"],
    "odd sizes leave a rest": pooled.CASES["odd sizes leave a rest"],
    "padded pool, not square": pooled.CASES["padded pool, not square"],
    "groups, same": pooled.CASES["groups, same"],
    "many channels": pooled.CASES["many channels"],
    "empty batch": pooled.CASES["empty batch"],
    "overlapping, 3x3/2": pooled.CASES["whole vectors, 3x3/2"],
    "partial windows, 3x3/2": pooled.CASES["partial windows, 3x3/2"],
    "5x5/3, 3x3/2": ((1, 3, 16, 13), (5, 3, 5, 5), {"stride": 3, "padding": 2}, {"kernel_size": 3, "stride": 2}),
}


class Recorder(TorchDispatchMode):
    """Records the operators that run."""

    takes_any_operator = True

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls.append((str(func), args))
        return func(*args, **(kwargs or {}))

    def count(self, name: str) -> int:
        return sum(called == name for called, _ in self.calls)


# Parity of every gradient


def given(input: Any, weight: Any, dtype: torch.dtype, format: torch.memory_format) -> tuple[torch.Tensor, ...]:
    """Return input, weight and bias; in 16 bits whole numbers, so that one sign or winner is right."""
    values = plain.tensors(input, weight, dtype, format)
    return values if dtype == torch.float32 else tuple(torch.randint_like(t, -2, 3) for t in values)


@each_variant(CASES)
def test_parity(case: Any, dtype: torch.dtype, format: torch.memory_format) -> None:
    input, weight, settings = case
    assert_parity(*plain.both(**settings), given(input, weight, dtype, format), ("triton", OURS))


@each_variant(POOLED)
def test_pooled_parity(case: Any, dtype: torch.dtype, format: torch.memory_format) -> None:
    input, weight, settings, pool = case
    assert_parity(*pooled.both(settings, pool), given(input, weight, dtype, format), ("triton", OURS))


@each_format
@pytest.mark.parametrize("algorithm", ["epilogue+dgrad", "epilogue+wgrad"])
def test_one_gradient_ours_and_one_torchs(algorithm: str, format: torch.memory_format) -> None:
    tensors = given((2, 5, 8, 6), (4, 5, 3, 3), torch.bfloat16, format)
    assert_parity(*plain.both(padding=1), tensors, ("triton", algorithm))
    assert_parity(*pooled.both({"padding": 1}, {"kernel_size": 2}), tensors, ("triton", algorithm))


@each_dtype
@each_format
def test_rounding(format: torch.memory_format, dtype: torch.dtype) -> None:
    x, w, b = plain.tensors((2, 9, 8, 6), (4, 9, 3, 3), dtype, format)
    # all values positive: no sign for a rounding to change
    fast, stock = plain.both(padding=1)
    assert_parity(fast, stock, (x.abs(), w.abs(), b.abs()), ("triton", OURS))


@pytest.mark.parametrize("config", mostly_sweep(fastcnn.backend.configurations("triton", "dgrad")))
def test_every_tile_of_dgrad(config: str) -> None:
    tensors = given((1, 20, 6, 5), (70, 20, 3, 3), torch.bfloat16, torch.channels_last)
    assert_parity(*plain.both(padding=1), tensors, ("triton", f"epilogue+dgrad:{config}"))


@pytest.mark.parametrize("config", mostly_sweep(fastcnn.backend.configurations("triton", "wgrad")))
def test_every_tile_of_wgrad(config: str) -> None:
    tensors = given((5, 24, 9, 7), (70, 24, 3, 3), torch.bfloat16, torch.channels_last)
    assert_parity(*plain.both(padding=1), tensors, ("triton", f"epilogue+wgrad:{config}"))


@pytest.mark.parametrize("kind", ["dgrad", "wgrad"])
def test_large_tiles_refuse_what_is_read_value_by_value(kind: str) -> None:
    *large, small, smallest = fastcnn.backend.configurations("triton", kind)
    x, w, b = (each.requires_grad_() for each in given((2, 8, 6, 5), (8, 8, 3, 3), torch.float32, FORMATS["nchw"]))
    for config in large:
        with fastcnn.use_backend("triton", algorithm=f"epilogue+{kind}:{config}"):
            y = FF.conv2d_relu(x, w, b, padding=1)
            expected = f"backend 'triton' takes argument 'algorithm' .* {small}, {smallest} .*, got '{config}'"
            with pytest.raises(RuntimeError, match=expected):
                torch.autograd.grad(y.sum(), [x, w])


@each_format
def test_pixels_in_several_parts(format: torch.memory_format) -> None:
    tensors = given((2, 2, 17, 16), (8, 2, 3, 3), torch.bfloat16, format)
    assert_parity(*plain.both(padding=1), tensors, ("triton", OURS))


@each_format
def test_with_an_implicit_gemm_forward(format: torch.memory_format) -> None:
    tensors = plain.tensors((2, 5, 7, 6), (4, 5, 3, 3), torch.float32, format)
    assert_parity(*plain.both(padding=1), tensors, ("triton", "implicit_gemm:64x16x32w4s3+dgrad+wgrad"))


@pytest.mark.parametrize("formats", [("nchw", "channels_last"), ("channels_last", "nchw")], ids=str)
def test_input_and_weight_in_different_layouts(formats: tuple[str, str]) -> None:
    x, w, b = plain.tensors((2, 3, 6, 5), (4, 3, 3, 3), torch.float32, torch.contiguous_format)
    x, w = x.to(memory_format=FORMATS[formats[0]]), w.to(memory_format=FORMATS[formats[1]])
    assert_parity(*plain.both(padding=1), (x, w, b), ("triton", OURS))


def test_without_bias_and_unbatched() -> None:
    x, w, _ = plain.tensors((1, 3, 6, 5), (4, 3, 3, 3), torch.float32, torch.contiguous_format)
    assert_parity(*plain.both(padding=1), (x[0], w, None), ("triton", OURS))


@each_format
def test_offsets_of_64_bits(format: torch.memory_format, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastcnn.triton.tiles.WIDE_FROM", 1)  # as if one image had 2**31 elements
    tensors = plain.tensors((2, 5, 7, 6), (4, 5, 3, 3), torch.float32, format)
    assert_parity(*plain.both(padding=1), tensors, ("triton", OURS))
    assert_parity(*pooled.both({"padding": 1}, {"kernel_size": 2}), tensors, ("triton", OURS))


@each_algorithm
def test_special_values_go_through_as_in_torch(algorithm: str) -> None:
    weight = torch.ones(3, 1, 1, 1, device=DEVICE)  # one product a pixel: no order of summation to differ in
    tensors = (specials(2, 1, 8, 7), weight, torch.zeros(3, device=DEVICE))
    assert_same(*plain.both(), tensors, ("triton", algorithm))
    assert_same(*pooled.both({}, {"kernel_size": 3, "stride": 2}), tensors, ("triton", algorithm))


@each_format
def test_gradients_repeat(format: torch.memory_format) -> None:
    x, w, b = (t.requires_grad_() for t in plain.tensors((2, 4, 17, 16), (8, 4, 3, 3), torch.float32, format))
    with fastcnn.use_backend("triton", algorithm=OURS):
        output = FF.conv2d_relu(x, w, b, padding=1)
        grad = torch.randn_like(output)
        first, second = (torch.autograd.grad(output, (x, w, b), grad, retain_graph=True) for _ in range(2))
    assert all(one.equal(other) for one, other in zip(first, second, strict=True))


# What backward runs and allocates


@pytest.mark.parametrize("pool", [False, True], ids=["plain", "pooled"])
def test_the_gradient_before_the_pool_or_the_mask_is_never_written(pool: bool) -> None:
    x, w, b = (t.requires_grad_() for t in plain.tensors((1, 2, 24, 24), (16, 2, 1, 1), torch.float32, FORMATS["nchw"]))
    fast = pooled.both({}, {"kernel_size": 2})[0] if pool else plain.both()[0]
    with fastcnn.use_backend("triton", algorithm=OURS):
        output = fast(x, w, b)
        grad = torch.randn_like(output)
        with torch.profiler.profile(profile_memory=True) as profile:
            torch.autograd.grad(output, (x, w, b), grad)
    events = profile.events()
    assert {"fastcnn::dgrad", "fastcnn::wgrad"} <= {event.name for event in events}
    largest = max(event.self_cpu_memory_usage + event.self_device_memory_usage for event in events)
    assert 0 < largest <= x.nbytes  # an eighth of the convolution's output


NEEDS = {  # input, weight, bias -> operators: the pass that writes the gradient down, dgrad, wgrad, torch's
    (True, True, True): (0, 1, 1, 0),
    (False, True, True): (0, 0, 1, 0),
    (True, False, False): (0, 1, 0, 0),
    (True, False, True): (1, 1, 0, 0),
    (False, False, True): (1, 0, 0, 0),
    (False, True, False): (0, 0, 1, 0),
}


@pytest.mark.parametrize(("needs", "expected"), NEEDS.items(), ids=map(str, NEEDS))
def test_only_what_is_needed_runs(needs: tuple[bool, ...], expected: tuple[int, ...]) -> None:
    tensors = plain.tensors((2, 3, 6, 5), (4, 3, 3, 3), torch.float32, FORMATS["nchw"])
    leaves = [t.requires_grad_(need) for t, need in zip(tensors, needs, strict=True)]
    with fastcnn.use_backend("triton", algorithm=OURS), Recorder() as recorder:
        FF.conv2d_relu(*leaves, padding=1).square().sum().backward()
    names = ("fastcnn.conv_relu_backward.triton", "fastcnn.dgrad.triton", "fastcnn.wgrad.triton")
    assert tuple(map(recorder.count, (*names, "aten.convolution_backward.default"))) == expected
    assert [t.grad is not None for t in tensors] == list(needs)


@each_algorithm
@pytest.mark.parametrize("pool", [False, True], ids=["plain", "pooled"])
def test_second_derivatives_equal_stock(pool: bool, algorithm: str) -> None:
    def penalty(function: Any) -> Any:
        leaves = [t.requires_grad_() for t in tensors]
        grads = torch.autograd.grad(function(*leaves).square().mean(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)

    tensors = plain.tensors((2, 3, 6, 5), (4, 3, 3, 3), torch.float32, FORMATS["nchw"])
    fast, stock = pooled.both({"padding": 1}, {"kernel_size": 2}) if pool else plain.both(padding=1)
    with fastcnn.use_backend("triton", algorithm=algorithm):
        assert_equal_but_rounding(penalty(fast), penalty(stock))


# Operators


def operator_calls(dtype: torch.dtype = torch.float32) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    x, w, _ = plain.tensors((2, 3, 6, 5), (4, 3, 3, 3), dtype, torch.channels_last)
    y = new(2, 4, 6, 5, dtype=dtype, format=torch.channels_last)
    conv, none, pool = [1, 1, 1, 1, 1, 1, 1], [], [2, 2, 2, 2, 0, 0, 1, 1, 0]
    half = new(2, 4, 3, 2, dtype=dtype, format=torch.channels_last)
    codes = torch.randint(0, 4, half.shape, device=DEVICE).byte().to(memory_format=torch.channels_last)
    dgrad, wgrad = torch.ops.fastcnn.dgrad.triton, torch.ops.fastcnn.wgrad.triton
    return {
        "dgrad, masked both ways": (dgrad, (y, y, x, w, True, True, None, conv, none)),
        "dgrad, dense": (dgrad, (y, None, x, w, False, False, None, conv, none)),
        "dgrad, pooled": (dgrad, (half, codes, x, w, False, False, None, conv, pool)),
        "wgrad, masked": (wgrad, (y, y, x, w, True, None, conv, none)),
        "wgrad, pooled": (wgrad, (half, codes, x, w, False, None, conv, pool)),
    }


@pytest.mark.parametrize("name", operator_calls())
def test_operators_keep_torchs_rules(name: str) -> None:
    operator, args = operator_calls()[name]
    torch.library.opcheck(operator, args, test_utils=("test_schema", "test_faketensor"))


@each_dtype
def test_dgrad_masks_by_the_input_and_keeps_nan(dtype: torch.dtype) -> None:
    operator, args = operator_calls(dtype)["dgrad, masked both ways"]
    x = args[2]
    x[0, 0, 0, :2] = torch.tensor([float("nan"), 0.0])
    masked, sums = operator(*args)
    whole, _ = operator(*args[:4], False, False, *args[6:])
    assert torch.equal(masked, torch.where(x <= 0, 0, whole))
    assert (sums.float() - masked.float().sum((0, 2, 3))).abs().max() <= 4 * torch.finfo(dtype).eps * sums.abs().max()


# Names


@pytest.mark.parametrize(
    ("backend", "algorithm", "words"),
    [
        ("triton", "epilogue+sgrad", "expected one of dgrad, wgrad once after a plus"),
        ("triton", "dgrad", "expected one of epilogue"),
        ("triton", "epilogue+dgrad+dgrad", "expected one of dgrad, wgrad once"),
        ("triton", "epilogue+", "expected one of dgrad, wgrad once"),
        ("triton", "epilogue+dgrad:1x1", "expected for the configuration of 'dgrad' .*one of 128x128x64w8s3"),
        pytest.param(
            *("cpu", "epilogue+dgrad", "backend 'cpu' has no gradients"),
            marks=pytest.mark.skipif(not fastcnn.backends()["cpu"].available, reason="needs the cpu backend"),
        ),
    ],
)
def test_unknown_gradients_are_a_value_error(backend: str, algorithm: str, words: str) -> None:
    with pytest.raises(ValueError, match=f"algorithm: .*{words}") as caught:
        fastcnn.use_backend(backend, algorithm=algorithm)
    assert repr(algorithm) in str(caught.value)
