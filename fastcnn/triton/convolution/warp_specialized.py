"""Convolution + bias + ReLU (+ 2x2 max-pool) for Hopper in Gluon: warps that copy beside warps that multiply.

Algorithm ``warp_specialized``. Boxes, operands and plans are those of `tma` (see hopper.py). A program stays on its
multiprocessor and goes over tiles; while eight warps end one tile, the copying warp already fetches the next.
Gluon has no interpreter: no GPU has checked this kernel yet.
"""

from typing import Any

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from fastcnn.triton.convolution import hopper
from fastcnn.triton.convolution.hopper import WARP_SPECIALIZED, Algorithm, Boxed, Plan, Sizes

CAPABILITIES = (9,)
COPY_REGISTERS = 24  # of a thread of the copying warp
RESIDENT = {8: 1, 4: 2}  # programs on a multiprocessor, by the warps that multiply; two end their tiles at other times
REGISTERS = {8: 168, 4: 128}  # of a thread at launch: all that so many programs may have

tile_start = gluon.jit(hopper.tile_start.fn)
taps = gluon.jit(hopper.taps.fn)
finish_pool = gluon.jit(hopper.finish_pool.fn)


@gluon.jit
def copy_warp(
    x_desc, w_desc, x_ring, w_ring, empty, ready, sizes, TILES,
    WINDOW: gl.constexpr, BOX: gl.constexpr, CONFIG: gl.constexpr,
):  # fmt: skip
    """Fetch, tile by tile and tap by tap, boxes of the input and of the weights into a ring of DEPTH places."""
    DEPTH: gl.constexpr = CONFIG.num_stages
    step = 0
    for tile in range(gl.program_id(0), TILES, gl.num_programs(0)):
        h0, w0, n, co = tile_start(tile, sizes, BOX, CONFIG)
        r0, rows, s0, columns = taps(h0, w0, sizes, WINDOW, BOX)
        for r in range(r0, r0 + rows):
            for s in range(s0, s0 + columns):
                for ci in range(0, sizes.channels, CONFIG.block_k):
                    place = step % DEPTH
                    mbarrier.wait(empty.index(place), ((step // DEPTH) & 1) ^ 1)
                    bar = ready.index(place)
                    mbarrier.expect(bar, x_desc.block_type.nbytes + w_desc.block_type.nbytes)
                    h = h0 + r * WINDOW.dilation[0] - WINDOW.padding[0]
                    w = w0 + s * WINDOW.dilation[1] - WINDOW.padding[1]
                    tma.async_copy_global_to_shared(x_desc, [h, w, n, ci], bar, x_ring.index(place))
                    tap = r * WINDOW.size[1] + s
                    tma.async_copy_global_to_shared(w_desc, [tap, co, ci], bar, w_ring.index(place))
                    step += 1


@gluon.jit
def matrix_warps(
    y_desc, code_desc, bias_ptr, x_ring, w_ring, y_smem, code_smem, empty, ready, sizes, TILES,
    WINDOW: gl.constexpr, RELU: gl.constexpr, POOL: gl.constexpr, BOX: gl.constexpr, CONFIG: gl.constexpr,
):  # fmt: skip
    """Multiply what the copying warp brings, and end each tile: bias, ReLU, pool, codes, and the copy out."""
    BLOCK_CO: gl.constexpr = CONFIG.block_m
    PIXELS: gl.constexpr = CONFIG.block_n
    BLOCK_CI: gl.constexpr = CONFIG.block_k
    DEPTH: gl.constexpr = CONFIG.num_stages
    # All warps along the channels, so that a window's pixels are in one thread.
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[gl.num_warps(), 1], instr_shape=[16, PIXELS, 16]
    )
    step = 0
    for tile in range(gl.program_id(0), TILES, gl.num_programs(0)):
        h0, w0, n, co = tile_start(tile, sizes, BOX, CONFIG)
        _, rows, _, columns = taps(h0, w0, sizes, WINDOW, BOX)
        steps = rows * columns * gl.cdiv(sizes.channels, BLOCK_CI)
        acc = gl.zeros((BLOCK_CO, PIXELS), dtype=gl.float32, layout=LAYOUT)
        for k in range(steps):
            place = step % DEPTH
            mbarrier.wait(ready.index(place), (step // DEPTH) & 1)
            x = x_ring.index(place).reshape([PIXELS, BLOCK_CI]).permute((1, 0))
            weight = w_ring.index(place).reshape([BLOCK_CO, BLOCK_CI])
            acc = warpgroup_mma(weight, x, acc, is_async=True)
            acc = warpgroup_mma_wait(num_outstanding=1, deps=(acc,))
            mbarrier.arrive(empty.index((step + DEPTH - 1) % DEPTH), count=1, pred=k > 0)
            step += 1
        acc = warpgroup_mma_wait(num_outstanding=0, deps=(acc,))
        mbarrier.arrive(empty.index((step + DEPTH - 1) % DEPTH), count=1, pred=steps > 0)
        if bias_ptr is not None:
            out = co + gl.arange(0, BLOCK_CO, layout=gl.SliceLayout(1, LAYOUT))
            acc += gl.load(bias_ptr + out, mask=out < sizes.out_channels, other=0.0).to(gl.float32)[:, None]
        tma.store_wait(pendings=0)
        if POOL:
            y, code = finish_pool(acc, y_desc.dtype, BOX, BLOCK_CO)
            y_smem.reshape([PIXELS // 4, BLOCK_CO]).permute((1, 0)).store(y)
            if code_desc is not None:
                code_smem.reshape([PIXELS // 4, BLOCK_CO]).permute((1, 0)).store(code)
        else:
            if RELU:
                acc = gl.where(acc <= 0.0, 0.0, acc)
            y_smem.reshape([PIXELS, BLOCK_CO]).permute((1, 0)).store(acc.to(y_desc.dtype))
        fence_async_shared()
        STEP: gl.constexpr = 2 if POOL else 1
        tma.async_copy_shared_to_global(y_desc, [h0 // STEP, w0 // STEP, n, co], y_smem)
        if code_desc is not None:
            tma.async_copy_shared_to_global(code_desc, [h0 // STEP, w0 // STEP, n, co], code_smem)
    tma.store_wait(pendings=0)


@gluon.jit
def warp_specialized_kernel(
    x_desc, w_desc, bias_ptr, y_desc, code_desc, sizes, TILES,
    WINDOW: gl.constexpr, RELU: gl.constexpr, POOL: gl.constexpr, BOX: gl.constexpr, CONFIG: gl.constexpr,
    COPY_REGISTERS: gl.constexpr,
):  # fmt: skip
    """Do what `tma_kernel` does; a grid of at most one program a multiprocessor goes over all TILES."""
    DEPTH: gl.constexpr = CONFIG.num_stages
    x_ring = gl.allocate_shared_memory(x_desc.dtype, [DEPTH] + x_desc.block_type.shape, x_desc.layout)
    w_ring = gl.allocate_shared_memory(w_desc.dtype, [DEPTH] + w_desc.block_type.shape, w_desc.layout)
    y_smem = gl.allocate_shared_memory(y_desc.dtype, y_desc.block_type.shape, y_desc.layout)
    code_smem = y_smem
    if code_desc is not None:
        code_smem = gl.allocate_shared_memory(code_desc.dtype, code_desc.block_type.shape, code_desc.layout)
    empty = gl.allocate_shared_memory(gl.int64, [DEPTH, 1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [DEPTH, 1], mbarrier.MBarrierLayout())
    for place in gl.static_range(DEPTH):
        mbarrier.init(empty.index(place), count=1)
        mbarrier.init(ready.index(place), count=1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (matrix_warps, (
                y_desc, code_desc, bias_ptr, x_ring, w_ring, y_smem, code_smem, empty, ready, sizes, TILES,
                WINDOW, RELU, POOL, BOX, CONFIG,
            )),
            (copy_warp, (x_desc, w_desc, x_ring, w_ring, empty, ready, sizes, TILES, WINDOW, BOX, CONFIG)),
        ],
        [1],
        [COPY_REGISTERS],
    )  # fmt: skip


def descriptor(boxed: Boxed | None) -> TensorDescriptor | None:
    """Return what Gluon makes a descriptor of the copy engine from."""
    if boxed is None:
        return None
    layout = gl.NVMMASharedLayout.get_default_for(boxed.box, getattr(gl, str(boxed.base.dtype).partition(".")[2]))
    return TensorDescriptor(*boxed, layout)


def launch(plan: Plan, boxed: Any, multiprocessors: int, bias: Tensor | None, sizes: Sizes, flags: Any) -> None:
    """Launch as many programs as fit the multiprocessors side by side, if there are so many tiles."""
    x, w, y, code = map(descriptor, boxed)
    warps = plan.config.num_warps
    warp_specialized_kernel[(min(plan.tiles, multiprocessors * RESIDENT[warps]),)](
        x, w, bias, y, code, sizes, plan.tiles, COPY_REGISTERS=COPY_REGISTERS,
        num_warps=warps, maxnreg=REGISTERS[warps], **flags,
    )  # fmt: skip


convolution = Algorithm("warp_specialized", WARP_SPECIALIZED, CAPABILITIES, launch)
