"""Normalization, convolution, ReLU and max-pool: ``normalize_conv_relu_pool``, its ``_codes``, and autograd."""

from typing import Any

from torch import Tensor

from fastcnn.ops import convolution
from fastcnn.ops.conv_relu_pool import OP as SEPARATE
from fastcnn.ops.normalize_conv_relu import image_gradients, joined, of_images
from fastcnn.ops.record import CONVOLUTION, IMAGES, POOL, Op

OP = Op(
    "normalize_conv_relu_pool",
    "conv2d_relu_max_pool2d",
    IMAGES,
    CONVOLUTION,
    POOL,
    backends=("triton",),
    product="conv",
)
OP.forward(of_images(convolution.fake), of_images(convolution.flops))


@OP.differentiable(
    "NormalizeConvReLUPool",
    "settings",
    "window",
    saves=lambda ctx, inputs, output: (*inputs[:4], *output[1:]),
    anchored=True,
)
def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """(N, C, H, W) -> pooled values and codes; saves images, weight and codes, and normalizes again later."""
    return image_gradients(SEPARATE, ctx, grad, ctx.window)


normalize_conv_relu_pool = joined(OP, SEPARATE)
