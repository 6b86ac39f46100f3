"""Stock torch's kernels are found in its library, and go the ways that were read there."""

import re

import cuda_headline
import issue_slots
import pytest
import stock_cases
import torch
from stock_kernels import copy, dimensions, launched, multiply

READ = "2.14"  # the torch whose code the branches of stock_kernels.py were read from


LIKE_READ = pytest.mark.skipif(
    not (torch.__version__.startswith(READ) and stock_cases.LIBRARY.exists()),
    reason=f"read from torch {READ}'s library",
)


@LIKE_READ
def test_stock_is_counted_for_every_case_whose_kernels_are_in_its_library() -> None:
    names = {case.name for case in cuda_headline.cases()}
    assert stock_cases.rows().keys() == {
        name for name in names if not name.startswith(("fp32 NHWC batch", "fp32 NCHW batch"))
    }


@LIKE_READ
def test_kernels_that_touch_each_element_once_access_all_of_their_bytes_on_the_way_they_go() -> None:
    once = ("29vectorized", "13reduce", "36batch", "50batch", "26batch", "46batch", "47batch_norm_backward")
    code = stock_cases.listings()
    kernels = [kernel for case, kernels in stock_cases.cases() if re.search("224|55|56", case) for kernel in kernels]
    found = {kernel for kernel in kernels if kernel.name.startswith(once)}
    assert {name for name in once if any(kernel.name.startswith(name) for kernel in found)} == set(once)
    for kernel in found:
        times = issue_slots.follow(code[kernel.name], kernel.branches)
        accesses = zip(code[kernel.name], times, strict=True)
        accessed = sum(n * issue_slots.bytes_of(each) for each, n in accesses) * 32 * kernel.warps
        assert accessed == pytest.approx(kernel.bytes, rel=0.01), kernel


def new(format: torch.memory_format = torch.contiguous_format, side: int = 4) -> torch.Tensor:
    return torch.empty((2, 8, side, side), dtype=torch.bfloat16, device="meta", memory_format=format)


def test_dimensions_that_lie_in_a_row_are_one() -> None:
    last, bias = torch.channels_last, torch.empty((1, 8, 1, 1), device="meta")
    assert dimensions([new(), new()]) == dimensions([new(last), new(last)]) == 1
    assert dimensions([new(last), bias, new(last)]) == 2  # channels, and all else
    assert dimensions([new(), bias, new()]) == 3  # pixels, channels, images
    assert dimensions([new(last), new()]) == 3
    assert dimensions([torch.empty((2, 8, 5, 4), device="meta"), new(side=5)[..., 1:]]) == 2  # a row's pixels, and rows


def test_a_thread_computes_eight_elements_where_tensors_lie_alike_and_four_elsewhere() -> None:
    (alike,), (apart,) = multiply(new(), new(), new()), copy(new(torch.channels_last), new())
    assert (alike.warps, alike.bytes) == (1, 3 * 512)
    assert (apart.warps, apart.bytes) == (2, 2 * 512)


def test_an_operator_without_its_kernels_is_an_error() -> None:
    with pytest.raises(KeyError, match="exp"):
        launched(lambda: new().exp())
