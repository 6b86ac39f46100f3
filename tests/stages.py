"""The functions as functions of tensors alone, ours beside stock, for the tests of derivatives and transforms."""

from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F

import fastcnn
import fastcnn.functional as FF

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NORM = (5, 0.5, 0.75, 2.0)  # an alpha at which the normalization bends


@contextmanager
def kernels_in_float32():
    """Run Triton's kernels, with float32 products in convolutions: TF32 would hide what is compared."""
    convolutions = torch.backends.cudnn.conv
    before, convolutions.fp32_precision = convolutions.fp32_precision, "ieee"
    try:
        with fastcnn.use_backend("triton"):
            yield
    finally:
        convolutions.fp32_precision = before


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


class Stage:
    """A function of tensors, ours and stock, and tensors to call it on, the image first."""

    def __init__(self, ours, stock, *shapes):
        self.ours, self.stock, self.shapes = ours, stock, shapes

    def tensors(self, requires_grad=True):
        return [randn(*shape, seed=i).requires_grad_(requires_grad) for i, shape in enumerate(self.shapes)]


IMAGE, CONV = (2, 6, 9, 7), ((4, 6, 3, 3), (4,))
STAGES = {
    "conv2d_relu": Stage(
        lambda x, w, b=None: FF.conv2d_relu(x, w, b, padding=1),
        lambda x, w, b=None: F.relu(F.conv2d(x, w, b, padding=1)),
        IMAGE,
        *CONV,
    ),
    "conv2d_relu_max_pool2d": Stage(
        lambda x, w, b=None: FF.conv2d_relu_max_pool2d(x, w, b, padding=1, pool_size=3, pool_stride=2),
        lambda x, w, b=None: F.max_pool2d(F.relu(F.conv2d(x, w, b, padding=1)), 3, 2),
        IMAGE,
        *CONV,
    ),
    "max_pool2d": Stage(lambda x: FF.max_pool2d(x, 3, 2, 1), lambda x: F.max_pool2d(x, 3, 2, 1), IMAGE),
    "local_response_norm": Stage(
        lambda x: FF.local_response_norm(x, *NORM), lambda x: F.local_response_norm(x, *NORM), IMAGE
    ),
    "local_response_norm_max_pool2d": Stage(
        lambda x: FF.local_response_norm_max_pool2d(x, 3, *NORM[1:], pool_size=(2, 3), pool_stride=(2, 2)),
        lambda x: F.max_pool2d(F.local_response_norm(x, 3, *NORM[1:]), (2, 3), 2),
        IMAGE,
    ),
    "linear_relu": Stage(FF.linear_relu, lambda x, w, b=None: F.relu(F.linear(x, w, b)), (5, 7), (4, 7), (4,)),
}
WITH_PARAMETERS = ("conv2d_relu", "conv2d_relu_max_pool2d", "linear_relu")
each_stage = pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES)
each_stage_with_parameters = pytest.mark.parametrize(
    "stage", [STAGES[name] for name in WITH_PARAMETERS], ids=WITH_PARAMETERS
)


def assert_equal_but_rounding(actual, expected):
    """Compare derivatives in float32: sums of at most some hundred products, taken in another order.

    That moves a value by a few units of 2**-24 of the largest term, not of its own size: 2e-5 of the largest value
    leaves an order of magnitude for terms that cancel. A wrong factor, mask or winner shows at 1e-1.
    """
    for mine, stock in zip(torch.utils._pytree.tree_leaves(actual), torch.utils._pytree.tree_leaves(expected)):
        scale = stock.detach().abs().max().item() if stock.numel() else 0.0
        torch.testing.assert_close(mine, stock, rtol=0, atol=2e-5 * scale)


def loss_of(function):
    """Return a scalar loss of the function with a gradient that differs from place to place."""

    def loss(*tensors):
        output = function(*tensors)
        return (output.square() * torch.arange(1, output.numel() + 1, device=DEVICE).view(output.shape)).mean()

    return loss


def both(stage, derive):
    """Return what `derive` makes of the loss through our function and through stock."""
    return derive(loss_of(stage.ours), stage.tensors()), derive(loss_of(stage.stock), stage.tensors())
