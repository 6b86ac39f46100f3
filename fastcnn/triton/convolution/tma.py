"""Convolution + bias + ReLU (+ 2x2 max-pool) as one kernel fed by the copy engine of Hopper and later GPUs.

Algorithm ``tma``. See hopper.py for boxes and operands.
"""

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastcnn.shapes import Window
from fastcnn.triton.convolution import hopper
from fastcnn.triton.convolution.hopper import Boxed, finish_pool, inside, tile_start
from fastcnn.triton.tiles import multiply_add, vector

CAPABILITIES = (0, 9, 10)


@triton.jit
def tma_kernel(
    x_desc,
    w_desc,
    bias_ptr,
    y_desc,
    code_desc,
    C,
    H,
    W,
    OUT_C,
    TILES_H,
    TILES_W,
    BLOCKS_CO,
    WINDOW: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RELU: tl.constexpr,
    POOL: tl.constexpr,
    CODES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    IMAGES: tl.constexpr,
    BLOCK_CO: tl.constexpr,
    BLOCK_CI: tl.constexpr,
):
    """Convolve x: [H, W, N, C] with w: [C_out, R * S, C] to y: [OH, OW, N, C_out], or to [OH / 2, OW / 2, N, C_out].

    One program computes BLOCK_CO channels of one box of ROWS x COLUMNS x IMAGES pixels, before the pool.
    """
    h0, w0, n, co = tile_start(tl.program_id(0), TILES_H, TILES_W, BLOCKS_CO, ROWS, COLUMNS, IMAGES, BLOCK_CO)
    PIXELS: tl.constexpr = ROWS * COLUMNS * IMAGES
    r0, rows = inside(h0, ROWS, H, WINDOW.size[0], WINDOW.padding[0], WINDOW.dilation[0])
    s0, columns = inside(w0, COLUMNS, W, WINDOW.size[1], WINDOW.padding[1], WINDOW.dilation[1])
    chunks = tl.cdiv(C, BLOCK_CI)
    per_row = tl.maximum(columns, 1)
    acc = tl.zeros((BLOCK_CO, PIXELS), dtype=tl.float32)
    for i in tl.range(0, rows * columns * chunks):
        ci = i % chunks * BLOCK_CI
        tap = i // chunks
        r = r0 + tap // per_row
        s = s0 + tap % per_row
        h = h0 + r * WINDOW.dilation[0] - WINDOW.padding[0]
        w = w0 + s * WINDOW.dilation[1] - WINDOW.padding[1]
        x = tl.reshape(x_desc.load([h, w, n, ci]), (PIXELS, BLOCK_CI))
        weight = tl.reshape(w_desc.load([r * WINDOW.size[1] + s, co, ci]), (BLOCK_CO, BLOCK_CI))
        acc = multiply_add(weight, x.T, acc, "ieee")
    if HAS_BIAS:
        out = co + tl.arange(0, BLOCK_CO)
        acc += tl.load(bias_ptr + out, mask=out < OUT_C, other=0.0).to(tl.float32)[:, None]
    if POOL:
        y, code = finish_pool(acc, y_desc.dtype, ROWS, COLUMNS, IMAGES, BLOCK_CO)
        at = [h0 // 2, w0 // 2, n, co]
        y_desc.store(at, tl.reshape(y.T, (ROWS // 2, COLUMNS // 2, IMAGES, BLOCK_CO)))
        if CODES:
            code_desc.store(at, tl.reshape(code.T, (ROWS // 2, COLUMNS // 2, IMAGES, BLOCK_CO)))
    else:
        if RELU:
            acc = tl.where(acc <= 0.0, 0.0, acc)
        y_desc.store([h0, w0, n, co], tl.reshape(acc.to(y_desc.dtype).T, (ROWS, COLUMNS, IMAGES, BLOCK_CO)))


def descriptor(boxed: Boxed | None) -> TensorDescriptor | None:
    """Return what Triton makes a descriptor of the copy engine from."""
    return None if boxed is None else TensorDescriptor(*boxed)


def convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    window: Window,
    groups: int,
    algorithm: str | None,
    *,
    relu: bool = False,
    pool: bool = False,
    codes: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Launch the kernel.

    Args:
        input: (N, C, H, W).
        weight: (C_out, C, R, S).
        bias: (C_out,).
        window: the convolution's kernel.
        groups: of channels.
        algorithm: names a configuration after a colon; without, the one whose tiles fit best is taken.
        relu: apply ReLU; a pool does so anyway.
        pool: also pool over 2x2 windows.
        codes: return the argmax codes too.
    """
    hopper.refuse("tma", CAPABILITIES, input, weight, window, groups)
    call = hopper.make_call(hopper.TMA, algorithm, input, weight, window, pool, codes)
    if call.plan.tiles:
        box, tile = call.plan.box, call.plan.config
        tma_kernel[(call.plan.tiles,)](
            descriptor(call.x), descriptor(call.w), vector(bias), descriptor(call.y), descriptor(call.code),
            *call.numbers(),
            WINDOW=window, HAS_BIAS=bias is not None, RELU=relu, POOL=pool, CODES=codes,
            ROWS=box.rows, COLUMNS=box.columns, IMAGES=box.images,
            BLOCK_CO=tile.block_co, BLOCK_CI=tile.block_ci, num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    return call.results()
