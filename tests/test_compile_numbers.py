"""torch.compile holds numbers that change from call to call as symbols: every function takes them, without a break."""

import pytest
import torch
from stages import DEVICE, assert_equal_but_rounding, randn

import fastcnn
import fastcnn.functional as FF


def normed(x, momentum, eps):
    mean, variance = torch.zeros(4, device=DEVICE), torch.ones(4, device=DEVICE)
    return FF.batch_norm_relu(x, mean, variance, training=True, momentum=momentum, eps=eps), mean


def convolved(x, padding, pool_size):
    weight = torch.ones(4, 4, 3, 3, device=DEVICE)
    return FF.conv2d_relu_max_pool2d(x, weight, padding=padding, pool_size=pool_size)


CASES = {
    "momentum": (normed, [(0.1, 1e-5), (0.2, 1e-5), (0.3, 1e-5)]),
    "eps": (normed, [(0.1, 1e-5), (0.1, 1e-3), (0.1, 1e-2)]),
    "alpha": (lambda x, alpha: FF.local_response_norm(x, 3, alpha), [(0.1,), (0.2,), (0.3,)]),
    "beta": (lambda x, beta: FF.local_response_norm(x, 3, 0.1, beta), [(0.75,), (0.5,), (0.6,)]),
    "size": (lambda x, size: FF.local_response_norm(x, size, 0.1), [(3,), (5,), (7,)]),
    "window": (lambda x, size: FF.max_pool2d(x, size), [(2,), (3,), (4,)]),
    "rows of a window": (lambda x, rows: FF.max_pool2d(x, [rows, 2]), [(2,), (3,), (4,)]),
    "padding and pool": (convolved, [(1, 2), (2, 3), (3, 4)]),
    "columns of padding": (lambda x, columns: convolved(x, (1, columns), 2), [(1,), (2,), (3,)]),
}


@pytest.mark.parametrize("backend", ["auto", "cpu", "triton"])
@pytest.mark.parametrize("name", CASES)
def test_numbers_that_change_compile_without_a_break(name, backend):
    if not fastcnn.backends()[backend].available or (backend == "cpu" and DEVICE != "cpu"):
        pytest.skip(f"needs backend {backend}")
    function, calls = CASES[name]
    torch._dynamo.reset()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    with fastcnn.use_backend(backend):
        for seed, numbers in enumerate(calls):
            x = randn(2, 4, 8, 8, seed=seed)
            assert_equal_but_rounding(compiled(x, *numbers), function(x, *numbers))
