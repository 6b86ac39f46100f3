"""FLOPs: torch's counters find in fused stages what they find in the stock layers."""

import pytest
import torch
from parity import COMPILED
from stages import STAGES, each_stage, kernels_in_float32, randn
from torch.utils.flop_counter import FlopCounterMode

import fastcnn
import fastcnn.functional as FF
from fastcnn import front

each_kernel = pytest.mark.parametrize("backend", ["triton", *(name for name, _ in COMPILED)])


def counted(function, tensors):
    with FlopCounterMode(display=False) as counter:
        function(*tensors).sum().backward()
    return counter.get_total_flops()


@each_stage
@each_kernel
def test_flop_counter(stage, backend):
    with fastcnn.use_backend(backend):
        actual = counted(stage.ours, stage.tensors())
    assert actual == counted(stage.stock, stage.tensors())


@pytest.mark.parametrize("algorithm", ["implicit_gemm", "epilogue+dgrad+wgrad"])
def test_flop_counter_of_convolutions_that_are_ours(algorithm):
    def tensors():
        return [randn(2, 4, 5, 6).requires_grad_(), randn(6, 4, 3, 2).requires_grad_()]

    def function(image, weight):
        return FF.conv2d_relu(image, weight, stride=(1, 2), padding=1)

    with kernels_in_float32(), fastcnn.use_backend("triton", algorithm=algorithm):
        actual = counted(function, tensors())
    with fastcnn.use_backend("torch"):
        assert actual == counted(function, tensors())


def test_counters_count_the_kernels_operators():
    backend = COMPILED[0][0] if COMPILED else "triton"
    with FlopCounterMode(display=False) as counter, fastcnn.use_backend(backend):
        FF.conv2d_relu_max_pool2d(randn(2, 3, 6, 6), randn(4, 3, 3, 3), pool_size=2)
    (operators,) = [each for name, each in counter.get_flop_counts().items() if name == "Global"]
    assert [str(each) for each in operators] == ["fastcnn.conv_relu_pool"]


@each_kernel
@pytest.mark.parametrize("name", ["conv2d_relu", "conv2d_relu_max_pool2d"])
def test_profiler_counts_convolutions(name, backend, pytestconfig):
    """Triton's epilogue follows torch's own; of the compiled kernels the front tells."""
    if backend != "triton" and (front.problem or pytestconfig.getoption("--path") == "python"):
        pytest.skip("without the front nobody tells the profiler")
    stage = STAGES[name]

    def seen(function):
        with torch.profiler.profile(with_flops=True) as profile:
            function(*stage.tensors())
        return sum(event.flops for event in profile.key_averages() if event.key == "aten::conv2d")

    with fastcnn.use_backend(backend):
        assert seen(stage.ours) == seen(stage.stock) > 0
