"""Triton's interpreter, made faster by interpreter.py: what its launches leave behind."""

import pytest
import torch
import triton
import triton.language as tl

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled")


@triton.jit
def sum_of(a, b):
    return a + b


@triton.jit
def sums_kernel(x_ptr, y_ptr, COUNT: tl.constexpr):
    tl.static_assert(COUNT > 1)
    lanes = tl.arange(0, COUNT)
    tl.store(y_ptr + lanes, sum_of(tl.load(x_ptr + lanes), tl.load(y_ptr + lanes)))


def test_a_launch_leaves_the_language_as_it_was():
    def language():
        return tl.load, tl.core.load, tl.tensor.__add__, tl.range, tl.static_assert, tl.math.exp

    before = language()
    x, y = torch.tensor([1, 2]), torch.tensor([3, 4])
    sums_kernel[(1,)](x, y, 2)
    assert y.tolist() == [4, 6]
    assert language() == before
    with pytest.raises(Exception, match="AssertionError"):
        sums_kernel[(1,)](x, y, 1)
    assert language() == before
    sums_kernel[(1,)](x, y, 2)
    assert y.tolist() == [5, 8]
