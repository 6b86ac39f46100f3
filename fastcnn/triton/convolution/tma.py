"""Convolution + bias + ReLU (+ 2x2 max-pool) as one kernel fed by the copy engine of Hopper and later GPUs.

Algorithm ``tma``. See hopper.py for boxes and operands.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastcnn.triton.convolution.hopper import TMA, Algorithm, Boxed, Plan, Sizes, finish_pool, taps, tile_start
from fastcnn.triton.tiles import multiply_add

CAPABILITIES = (0, 9, 10)


@triton.jit
def tma_kernel(
    x_desc, w_desc, bias_ptr, y_desc, code_desc, sizes,
    WINDOW: tl.constexpr, RELU: tl.constexpr, POOL: tl.constexpr, BOX: tl.constexpr, CONFIG: tl.constexpr,
):  # fmt: skip
    """Convolve x: [H, W, N, C] with w: [C_out, R * S, C] to y: [OH, OW, N, C_out], or to [OH / 2, OW / 2, N, C_out].

    One program computes CONFIG.block_m channels of one BOX of pixels, before the pool.
    """
    CO: tl.constexpr = CONFIG.block_m
    PIXELS: tl.constexpr = CONFIG.block_n
    CI: tl.constexpr = CONFIG.block_k
    h0, w0, n, co = tile_start(tl.program_id(0), sizes, BOX, CONFIG)
    r0, rows, s0, columns = taps(h0, w0, sizes, WINDOW, BOX)
    chunks = tl.cdiv(sizes.channels, CI)
    per_row = tl.maximum(columns, 1)
    acc = tl.zeros((CO, PIXELS), dtype=tl.float32)
    for i in tl.range(0, rows * columns * chunks):
        ci = i % chunks * CI
        tap = i // chunks
        r = r0 + tap // per_row
        s = s0 + tap % per_row
        h = h0 + r * WINDOW.dilation[0] - WINDOW.padding[0]
        w = w0 + s * WINDOW.dilation[1] - WINDOW.padding[1]
        x = tl.reshape(x_desc.load([h, w, n, ci]), (PIXELS, CI))
        weight = tl.reshape(w_desc.load([r * WINDOW.size[1] + s, co, ci]), (CO, CI))
        acc = multiply_add(weight, x.T, acc, "ieee")
    if bias_ptr is not None:
        out = co + tl.arange(0, CO)
        acc += tl.load(bias_ptr + out, mask=out < sizes.out_channels, other=0.0).to(tl.float32)[:, None]
    if POOL:
        y, code = finish_pool(acc, y_desc.dtype, BOX, CO)
        at = [h0 // 2, w0 // 2, n, co]
        y_desc.store(at, tl.reshape(y.T, (BOX.rows // 2, BOX.columns // 2, BOX.images, CO)))
        if code_desc is not None:
            code_desc.store(at, tl.reshape(code.T, (BOX.rows // 2, BOX.columns // 2, BOX.images, CO)))
    else:
        if RELU:
            acc = tl.where(acc <= 0.0, 0.0, acc)
        y_desc.store([h0, w0, n, co], tl.reshape(acc.to(y_desc.dtype).T, (BOX.rows, BOX.columns, BOX.images, CO)))


def descriptor(boxed: Boxed | None) -> TensorDescriptor | None:
    """Return what Triton makes a descriptor of the copy engine from."""
    return None if boxed is None else TensorDescriptor(*boxed)


def launch(plan: Plan, boxed: Any, multiprocessors: int, bias: Tensor | None, sizes: Sizes, flags: Any) -> None:
    """Launch one program a tile."""
    x, w, y, code = map(descriptor, boxed)
    config = plan.config
    tma_kernel[(plan.tiles,)](
        x, w, bias, y, code, sizes, num_warps=config.num_warps, num_stages=config.num_stages, **flags
    )


convolution = Algorithm("tma", TMA, CAPABILITIES, launch)
