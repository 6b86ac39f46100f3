"""What only a GPU can show: the kernels under CUDA-graph capture, on another stream, and on a second device."""

import pytest
import torch
from stages import assert_equal_but_rounding, each_stage, kernels_in_float32, loss_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def gradients(stage, tensors):
    return torch.autograd.grad(loss_of(stage.ours)(*tensors), tensors)


@each_stage
def test_captured_in_a_graph(stage):
    tensors = stage.tensors()
    with kernels_in_float32():
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            for _ in range(2):
                gradients(stage, tensors)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = gradients(stage, tensors)
        with torch.no_grad():
            tensors[0].copy_(torch.randn_like(tensors[0]))
        graph.replay()
        assert_equal_but_rounding(captured, gradients(stage, tensors))


@each_stage
def test_on_another_stream(stage):
    tensors = stage.tensors()
    with kernels_in_float32():
        expected = gradients(stage, tensors)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            actual = gradients(stage, tensors)
        stream.synchronize()
        assert_equal_but_rounding(actual, expected)


@each_stage
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
def test_on_the_second_device(stage):
    tensors = stage.tensors()
    with kernels_in_float32():
        expected = gradients(stage, tensors)
        actual = gradients(stage, [t.detach().to("cuda:1").requires_grad_() for t in tensors])
        assert_equal_but_rounding([t.to("cuda:0") for t in actual], expected)
