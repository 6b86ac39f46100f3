"""The gradient of a convolution's output, as dgrad and wgrad read it: dense, masked by ReLU, or still pooled.

The last two never exist in memory: each program masks or expands the tile that it multiplies.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcnn.shapes import Window
from fastcnn.triton import tiles
from fastcnn.triton.convolution.implicit_gemm import Config
from fastcnn.triton.max_pool_backward import unpool
from fastcnn.triton.tiles import dense, is_channels_last, is_wide, offset

SHARED_MEMORY = 99 * 1024  # of a program, in bytes, on the GPU that has least: sm_120
# Let ptxas use as many registers as there are: left to itself, for sm_100 it spills to leave more of them unused.
REGISTERS = 255


@triton.jit
def load_gradient(
    grad,
    mask,
    h,
    w,
    c,
    inside,
    C,
    GRAD_H,
    GRAD_W,
    SOURCE: tl.constexpr,
    POOL: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    """Load the gradient at pixels (h, w) of a convolution's output: h, w: [P], c: [C]; returns [P, C] in its dtype.

    `grad` and `mask` are [P, 1] pointers to the pixels' images: (C, GRAD_H, GRAD_W), pooled where SOURCE says so.
    Where `inside`: [P, C] is false, h and w are inside the image all the same, and the result is zero.
    """
    if SOURCE == "pooled":
        total = unpool(grad, mask, h, w, c, inside, C, GRAD_H, GRAD_W, POOL, CHANNELS_LAST)
        return total.to(grad.dtype.element_ty)
    at = offset(c[None, :], (h * GRAD_W + w)[:, None], C, GRAD_H * GRAD_W, CHANNELS_LAST)
    value = tl.load(grad + at, mask=inside, other=0.0)
    if SOURCE == "masked":
        y = tl.load(mask + at, mask=inside, other=0.0).to(tl.float32)
        value = tl.where(y <= 0.0, 0.0, value)
    return value


class Source(NamedTuple):
    """A gradient and its mask: none, the ReLU's output, or the codes of the pool after it."""

    grad: Tensor
    mask: Tensor | None
    pool: Window | None
    channels_last: bool

    @classmethod
    def of(cls, grad: Tensor, mask: Tensor | None, pool: Window | None) -> "Source":
        """Bring gradient and mask to one layout, which is the mask's."""
        like = dense(grad if mask is None else mask)
        channels_last = is_channels_last(like)
        format = torch.channels_last if channels_last else torch.contiguous_format
        return cls(grad.contiguous(memory_format=format), None if mask is None else like, pool, channels_last)

    @property
    def kind(self) -> str:
        """Return which of the three masks it has, as the kernels' constant."""
        return "dense" if self.mask is None else "masked" if self.pool is None else "pooled"


def is_wide_convolution(source: Source, input: Tensor, output_pixels: int) -> bool:
    """Whether offsets inside an image, or the number of pixels in the batch, want 64 bits."""
    return is_wide(source.grad, input) or output_pixels >= tiles.WIDE_FROM


def pick(
    configs: tuple[Config, ...], name: str | None, rows: int, columns: int, item_size: int, narrow: bool
) -> Config:
    """Return the configuration asked for, else the first that is no larger than the matrix and fits every GPU.

    `narrow`: one of the last two, for offsets that are many (NCHW, and few channels, are read value by value) or long
    (64 bits), as they take the registers.

    Raises:
        RuntimeError: another one was asked for, which would spill.
    """
    able = configs[-2:] if narrow else configs
    if name:
        named = {config.name: config for config in able}
        if name not in named:
            expected = f"with a configuration among {', '.join(named)} for what is read value by value"
            raise RuntimeError(
                f"backend 'triton' takes argument 'algorithm' {expected} (NCHW, few channels), got {name!r}"
            )
        return named[name]
    most_rows, most_columns = triton.next_power_of_2(rows), triton.next_power_of_2(columns)
    for config in able:
        if config.block_m <= max(most_rows, 64) and config.block_n <= most_columns:
            buffers = config.num_stages * config.block_k * (2 * config.block_m + config.block_n) * item_size
            if buffers <= SHARED_MEMORY:
                return config
    return configs[-1]
