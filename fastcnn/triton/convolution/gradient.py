"""The gradient of a convolution's output, as dgrad and wgrad read it: dense, masked by ReLU, or still pooled.

The last two never exist in memory: each program masks or expands the tile that it multiplies.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from fastcnn.shapes import Window
from fastcnn.triton import tiles
from fastcnn.triton.convolution.implicit_gemm import Config
from fastcnn.triton.max_pool_backward import unpool
from fastcnn.triton.tiles import is_wide, laid_out, offset, power_of_2

SHARED_MEMORY = 99 * 1024  # of a program, in bytes, on the GPU that has least: sm_120


@triton.jit
def load_gradient(
    grad_ptr, mask_ptr, image, h, w, c, inside, C, size, POOL: tl.constexpr, LAST: tl.constexpr
):  # fmt: skip
    """Load the gradient at pixels (h, w) of images of a convolution's output: image, h, w: [P], c: [C].

    Returns [P, C] in its dtype. Gradient and mask: (N, C, *size), pooled where there is a POOL. Where `inside`: [P, C]
    is false, h and w are inside the image all the same, and the result is zero.
    """
    rows = (image * C * size[0] * size[1])[:, None]
    if POOL is not None:
        total = unpool(grad_ptr + rows, mask_ptr + rows, h, w, c, inside, C, size[0], size[1], POOL, LAST.grad)
        return total.to(grad_ptr.dtype.element_ty)
    at = offset(c[None, :], (h * size[1] + w)[:, None], C, size[0] * size[1], LAST.grad)
    value = tl.load(grad_ptr + rows + at, mask=inside, other=0.0)
    if mask_ptr is not None:
        y = tl.load(mask_ptr + rows + at, mask=inside, other=0.0).to(tl.float32)
        value = tl.where(y <= 0.0, 0.0, value)
    return value


class Source(NamedTuple):
    """A gradient and its mask: none, the ReLU's output, or the codes of the pool after it."""

    grad: Tensor
    mask: Tensor | None
    pool: Window | None
    channels_last: bool
    size: tuple[int, ...]  # rows and columns of what is stored

    @classmethod
    def of(cls, grad: Tensor, mask: Tensor | None, pool: Window | None) -> "Source":
        """Bring gradient and mask to one layout, which is the mask's."""
        like, format, channels_last = laid_out(grad if mask is None else mask)
        grad, size = grad.contiguous(memory_format=format), tuple(grad.shape[2:])
        return cls(grad, None if mask is None else like, pool, channels_last, size)


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
    for config in able:
        buffers = config.num_stages * config.block_k * (2 * config.block_m + config.block_n) * item_size
        fits = config.block_m <= max(power_of_2(rows), 64) and config.block_n <= power_of_2(columns)
        if fits and buffers <= SHARED_MEMORY:
            return config
    return configs[-1]
