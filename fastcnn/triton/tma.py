"""Convolution + bias + ReLU (+ 2x2 max-pool) as one kernel fed by the copy engine of Hopper and later GPUs.

Algorithm ``tma``. See hopper.py for boxes and operands.
"""

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastcnn.shapes import Window
from fastcnn.triton import hopper
from fastcnn.triton.hopper import OFF, Boxed, Config, inside
from fastcnn.triton.tiles import INTERPRETING

CAPABILITIES = (9, 10)
CONFIGS = (
    Config(128, 256, 64, 8, 4),
    Config(256, 128, 64, 8, 4),
    Config(128, 128, 64, 8, 4),
    Config(64, 256, 64, 8, 4),
    Config(64, 128, 64, 4, 4),
    Config(128, 128, 64, 4, 3),
    Config(64, 256, 32, 4, 4),
)


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
    pid = tl.program_id(0)
    co = pid % BLOCKS_CO * BLOCK_CO
    tile = pid // BLOCKS_CO
    w0 = tile % TILES_W * COLUMNS
    h0 = tile // TILES_W % TILES_H * ROWS
    n = tile // TILES_W // TILES_H * IMAGES
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
        if INTERPRETING:
            x, weight = x.to(tl.float32), weight.to(tl.float32)
        acc = tl.dot(weight, x.T, acc)
    if HAS_BIAS:
        out = co + tl.arange(0, BLOCK_CO)
        acc += tl.load(bias_ptr + out, mask=out < OUT_C, other=0.0).to(tl.float32)[:, None]
    if POOL:
        # rounded as the stock convolution rounds, so that the same pixel wins
        value = acc.to(y_desc.dtype).to(tl.float32)
        window = tl.reshape(value, (BLOCK_CO, ROWS // 2, 2, COLUMNS // 2, 2, IMAGES))
        top, bottom = tl.split(tl.permute(window, (0, 1, 3, 5, 4, 2)))
        v0, v1 = tl.split(top)
        v2, v3 = tl.split(bottom)
        right, below = later_wins(v0, v1), later_wins(v2, v3)
        best_top, best_bottom = tl.where(right, v1, v0), tl.where(below, v3, v2)
        lower = later_wins(best_top, best_bottom)
        best = tl.where(lower, best_bottom, best_top)
        off = best <= 0.0
        y = tl.where(off, 0.0, best)
        if CODES:
            code = tl.where(lower, tl.where(below, 3, 2), tl.where(right, 1, 0))
            code = tl.reshape(tl.where(off, OFF, code).to(tl.uint8), (BLOCK_CO, PIXELS // 4))
            code = tl.reshape(code.T, (ROWS // 2, COLUMNS // 2, IMAGES, BLOCK_CO))
            code_desc.store([h0 // 2, w0 // 2, n, co], code)
        y = tl.reshape(y.to(y_desc.dtype), (BLOCK_CO, PIXELS // 4))
        y_desc.store([h0 // 2, w0 // 2, n, co], tl.reshape(y.T, (ROWS // 2, COLUMNS // 2, IMAGES, BLOCK_CO)))
    else:
        if RELU:
            acc = tl.where(acc <= 0.0, 0.0, acc)
        y_desc.store([h0, w0, n, co], tl.reshape(acc.to(y_desc.dtype).T, (ROWS, COLUMNS, IMAGES, BLOCK_CO)))


@triton.jit
def later_wins(earlier, later):
    """Whether the later of two places of a window wins: of equals the earlier, and the last NaN, as in torch."""
    return (later > earlier) | (later != later)


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
    call = hopper.make_call(CONFIGS, algorithm, input, weight, window, pool, codes)
    if call.plan.tiles:
        box, tile = call.plan.box, call.plan.config
        tma_kernel[(call.plan.tiles,)](
            descriptor(call.x), descriptor(call.w), bias, descriptor(call.y), descriptor(call.code),
            *call.numbers(),
            WINDOW=window, HAS_BIAS=bias is not None, RELU=relu, POOL=pool, CODES=codes,
            ROWS=box.rows, COLUMNS=box.columns, IMAGES=box.images,
            BLOCK_CO=tile.block_co, BLOCK_CI=tile.block_ci, num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    return call.results()
