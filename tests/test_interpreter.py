"""Triton's interpreter, made faster by interpreter.py, still checks what it checked, and leaves the language alone."""

import operator

import pytest
import torch
import triton
import triton.language as tl

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled")
LARGEST = 2**31 - 1


@triton.jit
def of_numbers(a, b, OPERATION: tl.constexpr):
    if OPERATION == "+":
        result = a + b
    elif OPERATION == "-":
        result = a - b
    else:
        result = a * b
    return result


@triton.jit
def numbers_kernel(x_ptr, y_ptr, OPERATION: tl.constexpr, COUNT: tl.constexpr):
    lanes = tl.arange(0, COUNT)
    tl.store(y_ptr + lanes, of_numbers(tl.load(x_ptr + lanes), tl.load(y_ptr + lanes), OPERATION))


def compute(x, operation, y, dtype=torch.int32):
    x, y = torch.tensor(x, dtype=dtype), torch.tensor(y, dtype=dtype)
    numbers_kernel[(1,)](x, y, operation, x.numel())
    return y.tolist()


OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul}


@pytest.mark.parametrize(("x", "operation", "y"), [(LARGEST, "+", 1), (-LARGEST, "-", 2), (2**15, "*", 2**16)])
def test_a_result_beyond_32_bits_is_an_error(x, operation, y):
    result = OPERATIONS[operation]
    with pytest.raises(Exception, match="int32 overflow detected for operation"):
        compute([0, x], operation, [0, y])
    assert compute([0, x], operation, [0, y - 1]) == [0, result(x, y - 1)]
    assert compute([0, x], operation, [0, y], torch.int64) == [0, result(x, y)]


def test_a_launch_leaves_the_language_as_it_was():
    before = tl.load, tl.core.load, tl.tensor.__add__, tl.range, tl.math.exp
    compute([1], "+", [2])
    with pytest.raises(Exception, match="overflow"):
        compute([LARGEST], "+", [1])
    assert (tl.load, tl.core.load, tl.tensor.__add__, tl.range, tl.math.exp) == before
