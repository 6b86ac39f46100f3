"""An evaluated batch norm folded into the convolution before it: whether that is done, and weight and bias."""

from torch import Tensor

from fastcnn.backend import runs_stock
from fastcnn.ops import autograd, checks

_STEM = "conv_bn"  # FASTEST's name for folding: no operator of its own


def folds(input: Tensor, *parameters: Tensor | None) -> bool:
    """Whether a convolution of `input` takes up the batch norm that follows it.

    It does where nobody wants a gradient. Under ``auto`` it also takes a device on which that was measured to be
    faster, an input at least as large as the weight, the first of `parameters`, for folding passes over that, and
    float32: folded weights of 16 bits are rounded once more than the stock layers' are.
    """
    if autograd.needs_grad(input, *parameters) or input.dtype not in checks.KERNEL_DTYPES:
        return False
    return not runs_stock(_STEM, "convolution and batch norm", input, None)


def folded(
    weight: Tensor, bias: Tensor | None, mean: Tensor, variance: Tensor, gamma: Tensor | None, beta: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return weight and bias of the one convolution, in the convolution's dtype."""
    scale = (variance.float() + eps).rsqrt()
    if gamma is not None:
        scale = scale * gamma
    shift = -mean * scale if bias is None else (bias - mean) * scale
    if beta is not None:
        shift = shift + beta
    return (weight * scale.view(-1, 1, 1, 1)).to(weight.dtype), shift.to(weight.dtype)
