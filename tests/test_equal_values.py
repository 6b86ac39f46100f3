"""Equal inputs give equal outputs wherever they lie, so that a pool after them sends its gradient to the first of ties.

A kernel works on whole vectors and on what is left of them; both must round alike, in every version of a loop that the
library holds, and in the backward that computes a value again.
"""

import importlib.util
import shutil
import subprocess
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from parity import DEVICE, assert_same, each_compiled, each_format

import fastcnn
import fastcnn.functional as FF

# Planes of AlexNet, and planes whose rows and pixels leave every rest over vectors of 8, 16 and 32.
PLANES = [(5, 5), (13, 13), (27, 27), *((3, width) for width in range(9, 41))]
LRN = {"size": 5, "alpha": 0.3, "beta": 0.75, "k": 2.0}
ANY_LRN = {"size": 4, "alpha": 0.3, "beta": 0.6, "k": 2.0}
POOL = {"pool_size": 3, "pool_stride": 2}
CHANNELS = 9

each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def channel_numbers() -> tuple[torch.Tensor, ...]:
    """Return mean, variance, weight and bias of a batch norm whose outputs ReLU leaves on."""
    mean, variance = torch.randn(CHANNELS, device=DEVICE), torch.rand(CHANNELS, device=DEVICE) + 0.5
    return mean, variance, torch.rand(CHANNELS, device=DEVICE) + 0.5, torch.rand(CHANNELS, device=DEVICE) + 4


def of_channels(values: torch.Tensor, dtype: torch.dtype, format: torch.memory_format) -> torch.Tensor:
    """Return values (2, 1, H, W) in every channel, times a number of the channel's own."""
    return (values * (torch.rand(1, CHANNELS, 1, 1, device=DEVICE) + 0.5)).to(dtype).contiguous(memory_format=format)


@each_compiled
@each_dtype
@each_format
@pytest.mark.parametrize("name", ["lrn", "any lrn", "bn_relu", "lrn_pool", "bn_relu_pool"])
def test_a_constant_plane_stays_constant(
    name: str, format: torch.memory_format, dtype: torch.dtype, backend: Any
) -> None:
    numbers = channel_numbers()
    run = {
        "lrn": lambda x: FF.local_response_norm(x, **LRN),
        "any lrn": lambda x: FF.local_response_norm(x, **ANY_LRN),
        "bn_relu": lambda x: FF.batch_norm_relu(x, *numbers),
        "lrn_pool": lambda x: FF.local_response_norm_max_pool2d(x, **LRN, **POOL),
        "bn_relu_pool": lambda x: FF.batch_norm_relu_max_pool2d(x, *numbers, **POOL),
    }[name]
    with fastcnn.use_backend(backend[0]):
        for plane in PLANES:
            y = run(of_channels(torch.ones(2, 1, *plane, device=DEVICE), dtype, format))
            assert torch.equal(y, y[:1, :, :1, :1].expand_as(y)), plane


@each_compiled
@each_format
def test_an_infinity_changes_no_other_pixel(format: torch.memory_format, backend: Any) -> None:
    """Kernels take another formula where a scale is infinite."""
    x = of_channels(torch.ones(2, 1, 27, 27, device=DEVICE), torch.float32, format)
    with fastcnn.use_backend(backend[0]):
        expected = FF.local_response_norm(x, **LRN)
        x[0, 2, 0, 0] = float("inf")
        y = FF.local_response_norm(x, **LRN)
    assert torch.equal(y.flatten(2)[..., 1:], expected.flatten(2)[..., 1:])


@each_compiled
@each_dtype
@each_format
def test_equal_values_stay_equal(format: torch.memory_format, dtype: torch.dtype, backend: Any) -> None:
    numbers = channel_numbers()
    with fastcnn.use_backend(backend[0]):
        for plane in PLANES:
            values = torch.randint(0, 4, (2, 1, *plane), device=DEVICE).float()
            x = of_channels(values, dtype, format)
            for y in (FF.local_response_norm(x, **LRN), FF.batch_norm_relu(x, *numbers)):
                for value in range(4):
                    for channel in range(CHANNELS):
                        assert len(y[:, channel][values[:, 0] == value].unique()) <= 1, (plane, value, channel)


def pooled_at(places: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return the values of (2, C, H, W) at the places (2, 1, OH, OW) of their planes."""
    return y.flatten(2).gather(2, places.flatten(2).expand(-1, CHANNELS, -1)).unflatten(2, places.shape[2:])


@each_compiled
@each_format
@pytest.mark.parametrize("highest", [1, 3], ids=["constant", "integers"])
def test_the_gradient_goes_to_the_first_of_ties(highest: int, format: torch.memory_format, backend: Any) -> None:
    """Both stages grow with their input here; the winners are the input's, as stock's own LRN parts some ties."""
    numbers = channel_numbers()
    norm = {**LRN, "alpha": 0.01}
    for plane in PLANES:
        values = torch.randint(1, highest + 1, (2, 1, *plane), device=DEVICE).float()
        at = partial(pooled_at, F.max_pool2d(values, 3, 2, return_indices=True)[1])
        x = of_channels(values, torch.float32, format)
        assert_same(
            partial(FF.local_response_norm_max_pool2d, **norm, **POOL),
            lambda x, at=at: at(F.local_response_norm(x, **norm)),
            (x,),
            backend,
        )
        assert_same(
            lambda x: FF.batch_norm_relu_max_pool2d(x, *numbers, **POOL),
            lambda x, at=at: at(F.relu(F.batch_norm(x, *numbers))),
            (x,),
            backend,
        )


def test_no_loop_of_the_library_fuses_multiplications_with_additions() -> None:
    """A version of a loop that this processor does not run would round otherwise only on another machine."""
    found, objdump = importlib.util.find_spec("fastcnn._C"), shutil.which("objdump")
    if found is None or found.origin is None or objdump is None:
        pytest.skip("no extension, or no objdump")
    code = subprocess.run(
        [objdump, "-d", "--no-show-raw-insn", found.origin], capture_output=True, text=True, check=True
    )
    fused = [line for line in code.stdout.splitlines() if "\tvfm" in line or "\tvfnm" in line or "\tfmla" in line]
    assert not fused, fused[:5]
