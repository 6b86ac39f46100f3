"""One step of SGD with momentum in Triton: reads the gradient; updates parameter, float32 master and momentum."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcnn.triton.normalize import is_wide_as_a_whole

BLOCK = 2048


@triton.jit
def sgd_kernel(
    shadow_ptr,
    grad_ptr,
    master_ptr,
    buffer_ptr,
    lr_ptr,
    lr,
    momentum,
    dampening,
    weight_decay,
    ELEMENTS,
    LR_TENSOR: tl.constexpr,
    MOMENTUM: tl.constexpr,
    FIRST: tl.constexpr,
    NESTEROV: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    SHADOW: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Update master and buffer in float32, and shadow, the weight that the model computes with; BLOCK a program.

    Where the shadow is not the rounded master, it was set since the last step: the master takes its value.
    On the FIRST step the buffer is the gradient. Without a SHADOW the master is the model's weight itself.
    """
    block = tl.program_id(0)
    if WIDE:
        block = block.to(tl.int64)
    at = block * BLOCK + tl.arange(0, BLOCK)
    mask = at < ELEMENTS
    rate = tl.load(lr_ptr).to(tl.float32) if LR_TENSOR else lr
    grad = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(master_ptr + at, mask=mask, other=0.0)
    if SHADOW:
        shadow = tl.load(shadow_ptr + at, mask=mask, other=0.0)
        weight = tl.where(shadow == weight.to(shadow.dtype), weight, shadow.to(tl.float32))
    if MAXIMIZE:
        grad = -grad
    grad += weight * weight_decay
    if MOMENTUM:
        if FIRST:
            velocity = grad
        else:
            velocity = tl.load(buffer_ptr + at, mask=mask, other=0.0) * momentum + grad * (1.0 - dampening)
        tl.store(buffer_ptr + at, velocity, mask=mask)
        grad = grad + velocity * momentum if NESTEROV else velocity
    weight -= grad * rate
    tl.store(master_ptr + at, weight, mask=mask)
    if SHADOW:
        tl.store(shadow_ptr + at, weight.to(shadow_ptr.dtype.element_ty), mask=mask)


def sgd(
    weight: Tensor,
    grad: Tensor,
    master: Tensor,
    buffer: Tensor | None,
    lr: float | Tensor,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
    first: bool,
) -> None:
    """Launch a step over one parameter; all tensors are dense, in the same memory order.

    Args:
        weight: the model's, a shadow of `master` or `master` itself.
        grad: its gradient.
        master, buffer: float32; without momentum there is no buffer.
        lr: a number, or a tensor on the device, which a CUDA graph reads anew at each replay.
        momentum, dampening, weight_decay, nesterov, maximize: as torch.optim.SGD's.
        first: the buffer holds nothing yet.
    """
    if weight.numel() == 0:
        return
    tensor = isinstance(lr, Tensor)
    with torch.cuda.device_of(weight):
        sgd_kernel[(triton.cdiv(weight.numel(), BLOCK),)](
            weight, grad, master, buffer, lr if tensor else None, 0.0 if tensor else lr,
            momentum, dampening, weight_decay, weight.numel(),
            LR_TENSOR=tensor, MOMENTUM=buffer is not None, FIRST=first, NESTEROV=nesterov, MAXIMIZE=maximize,
            SHADOW=master is not weight, WIDE=is_wide_as_a_whole(weight), BLOCK=BLOCK,
        )  # fmt: skip
