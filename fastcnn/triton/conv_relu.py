"""Convolution + bias + ReLU in Triton, one pass after torch's bias-free convolution, or a convolution that is all ours.

Layout: NCHW or NHWC. The convolutions themselves are in convolution/.
"""

from importlib import import_module
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcnn.shapes import conv_memory_format, memory_format
from fastcnn.triton.bn_relu import normalize_relu
from fastcnn.triton.bn_statistics import Norm
from fastcnn.triton.convolution import first_layers
from fastcnn.triton.convolution.implicit_gemm import Convolution, asked, implicit_gemm
from fastcnn.triton.max_pool_backward import by_tiles, by_vectors
from fastcnn.triton.tiles import ceil_div, fits_int32, indices, is_wide, laid_out, planes, vector

EPILOGUE = ("", "epilogue")  # names of the algorithm whose convolution is torch's
HOPPER = ("tma", "warp_specialized")  # algorithms, and the modules that have them
ALGORITHMS = {"implicit_gemm": implicit_gemm, **first_layers.ALGORITHMS}


@triton.jit
def bias_relu_planes_kernel(
    y_ptr, bias_ptr, ELEMENTS, C, P, WHOLE: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr
):
    """Add the bias to y: (N, C, P) in NCHW and apply ReLU, in place; one program does BLOCK vectors in memory order.

    A vector reaches into two planes at most, unless WHOLE: then into one.
    """
    first = indices(tl.program_id(0), BLOCK, False) * VECTOR
    inside = (first < ELEMENTS)[:, None]
    at = y_ptr + (first[:, None] + tl.arange(0, VECTOR)[None, :])
    value = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        plane = first // P
        channel = plane % C
        bias = tl.load(bias_ptr + channel).to(tl.float32)[:, None]
        if not WHOLE:
            following = tl.load(bias_ptr + tl.where(channel + 1 < C, channel + 1, 0)).to(tl.float32)[:, None]
            left = (plane * P + P - first)[:, None]  # of the vector's first plane
            bias = tl.where(tl.arange(0, VECTOR)[None, :] < left, bias, following)
        value += bias
    tl.store(at, tl.where(value <= 0.0, 0.0, value).to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["REPEAT"])
def relu_backward_planes_kernel(
    grad_ptr, y_ptr, dx_ptr, partial_ptr, C, P, scale, BLOCKS, REPEAT,
    WHOLE: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Do what masked_gradient_kernel does for a ReLU, in NCHW; one program does REPEAT blocks of a plane's vectors.

    Unless WHOLE, a plane begins and ends within a vector: its neighbours' programs write the same values there.
    """
    plane = tl.program_id(0) // BLOCKS
    block = tl.program_id(0) % BLOCKS
    start = plane.to(tl.int64) * P
    skip = 0 if WHOLE else (start % VECTOR).to(tl.int32)  # elements of the vector that are the plane before's
    base = start // VECTOR * VECTOR
    vectors = (skip + P + (VECTOR - 1)) // VECTOR
    partial = tl.zeros((BLOCK, VECTOR), tl.float32)
    for i in range(REPEAT):
        v = indices(block * REPEAT + i, BLOCK, False)
        element = (v * VECTOR)[:, None] + tl.arange(0, VECTOR)[None, :]
        inside = (v < vectors)[:, None]
        y = tl.load(y_ptr + base + element, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + base + element, mask=inside, other=0.0)
        grad = tl.where(y <= 0.0, 0.0, grad.to(tl.float32) * scale)
        tl.store(dx_ptr + base + element, grad.to(dx_ptr.dtype.element_ty), mask=inside)
        if partial_ptr is not None:
            partial += grad if WHOLE else tl.where((element >= skip) & (element < skip + P), grad, 0.0)
    if partial_ptr is not None:
        total = tl.sum(tl.sum(partial, axis=1), axis=0)
        tl.store(partial_ptr + (plane // C * BLOCKS + block) * C + plane % C, total)


def asked_hopper(algorithm: str | None) -> Any:
    """Return a Hopper convolution if one is asked for; imported then, as Gluon's interface may change."""
    name = (algorithm or "").partition(":")[0]
    return import_module(f"fastcnn.triton.convolution.{name}").convolution if name in HOPPER else None


def convolution(
    input: Tensor, weight: Tensor, bias: Tensor | None, *settings: Any, relu: bool, norm: Any = (None, None)
) -> tuple[Tensor, bool]:
    """Return a convolution with bias and, if asked, ReLU; or torch's without them, and that they are left to do.

    Only first layers' algorithms, which read raw images, take a normalization.
    """
    window, groups, algorithm = settings
    if hopper := asked_hopper(algorithm):
        return hopper(input, weight, bias, *settings, relu=relu)[0], False
    name, config = asked(algorithm)
    if name not in EPILOGUE:
        return ALGORITHMS[name](Convolution(input, weight, bias, window, groups, relu, config, norm)), False
    y = torch.ops.aten.conv2d(input, weight, None, window.stride, window.padding, window.dilation, groups)
    return y.contiguous(memory_format=conv_memory_format(input, weight)), True


def conv_relu(input: Tensor, weight: Tensor, bias: Tensor | None, *settings: Any) -> Tensor:
    """Operator ``fastcnn::conv_relu.triton``; `epilogue` serves every shape, so it is the default."""
    y, left = convolution(input, weight, bias, *settings, relu=True)
    if left:
        bias_relu_(y, bias)
    return y


def bias_relu_(y: Tensor, bias: Tensor | None) -> None:
    """Launch bias + ReLU in place over a dense (N, C, *)."""
    if y.numel() == 0:
        return
    images, channels, pixels = planes(y)
    channels_last, size = memory_format(y) != torch.contiguous_format, plane_vector(y, pixels)
    if pixels == 1:  # then the images are the pixels of one, in channels_last
        y, channels_last = y.view(1, images, channels).transpose(1, 2), True
    if not channels_last and size > 1 and fits_int32(y):
        block = 1024 // size
        bias_relu_planes_kernel[(ceil_div(y.numel(), block * size),)](
            y, vector(bias), y.numel(), channels, pixels, WHOLE=pixels % size == 0, VECTOR=size, BLOCK=block
        )
    else:
        normalize_relu(y, y, Norm(bias=vector(bias)), channels_last)


def plane_vector(tensor: Tensor, pixels: int) -> int:
    """Return how many elements of 16 bytes or less divide a dense NCHW tensor, so that a plane is at least as long."""
    elements, size = tensor.numel(), 16 // tensor.element_size()
    return min(elements & -elements, size) if pixels >= size else 1


def conv_relu_backward(grad: Tensor, output: Tensor, bias_grad: bool, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Operator ``fastcnn::conv_relu_backward.triton``: the masked gradient and the bias gradient, in one pass."""
    output, format, channels_last = laid_out(output)
    dx, grad = torch.empty_like(output), grad.contiguous(memory_format=format)
    pixels = planes(dx)[2]
    size = plane_vector(dx, pixels)
    if channels_last or size < 2 or is_wide(dx):
        return dx, by_tiles(grad, output, dx, bias_grad, scale=scale)
    whole = pixels % size == 0
    vectors = ceil_div(pixels + (0 if whole else size - 1), size)
    tensors = grad, output, dx, bias_grad
    return dx, by_vectors(relu_backward_planes_kernel, *tensors, size, vectors, pixels, scale, WHOLE=whole)
