"""What bounds a compiled kernel on a GPU: the blocks that fit a multiprocessor, and the least time of a launch."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor


class Multiprocessor(NamedTuple):
    """What one multiprocessor holds, by the CUDA C++ Programming Guide's table of compute capabilities."""

    warps: int
    blocks: int
    registers: int
    shared: int  # bytes


# By compute capability: A100, H200, B200, RTX 50 and RTX PRO.
MULTIPROCESSORS = {
    80: Multiprocessor(64, 32, 65536, 164 * 1024),
    90: Multiprocessor(64, 32, 65536, 228 * 1024),
    100: Multiprocessor(64, 32, 65536, 228 * 1024),
    120: Multiprocessor(48, 24, 65536, 100 * 1024),
}
RESERVED = 1024  # bytes of shared memory that the driver takes for each block
REGISTERS_AT_ONCE = 256  # registers are given to a warp in steps of so many

# An H200's ceilings, measured: 16-bit matrix products, TF32 at half their rate, and bytes copied (read plus written).
COPY = 4.3e12
PRODUCTS = {2: 790e12, 4: 395e12}


def program_memory(architecture: int) -> int:
    """Return the bytes of shared memory that one program may have."""
    return MULTIPROCESSORS[architecture].shared - RESERVED


def blocks_at_once(architecture: int, warps: int, registers: int, shared: int) -> int:
    """Return how many blocks run side by side on one multiprocessor."""
    holds = MULTIPROCESSORS[architecture]
    of_a_warp = -(-registers * 32 // REGISTERS_AT_ONCE) * REGISTERS_AT_ONCE
    return min(
        holds.blocks,
        holds.warps // warps,
        holds.registers // (of_a_warp * warps),
        holds.shared // (shared + RESERVED),
    )


def occupancy(architecture: int, warps: int, registers: int, shared: int) -> float:
    """Return which part of a multiprocessor's warps the blocks that fit it fill."""
    return blocks_at_once(architecture, warps, registers, shared) * warps / MULTIPROCESSORS[architecture].warps


def _boxed_flops(given: Mapping[str, Any]) -> int:
    """Return those of a Hopper convolution, whose output may be pooled."""
    y, weight = given["y_desc"].base, given["w_desc"].base
    pixels = y.numel() // y.shape[1] * (4 if given["POOL"] else 1)
    return int(2 * weight.numel() * pixels)


# Floating-point operations of a launch, by its arguments; kernels that are not here move memory.
FLOPS = {
    "implicit_gemm_kernel": lambda given: 2 * given["w_ptr"].numel() * given["M"],
    "tma_kernel": _boxed_flops,
    "warp_specialized_kernel": _boxed_flops,
    "dgrad_kernel": lambda given: 2 * given["w_ptr"].numel() * given["M"] // _strides(given),
    "wgrad_kernel": lambda given: (
        2 * given["sizes"].out_channels * given["sizes"].group_in * _places(given) * given["P"]
    ),
}


def _places(given: Mapping[str, Any]) -> int:
    return given["WINDOW"].size[0] * given["WINDOW"].size[1]


def _strides(given: Mapping[str, Any]) -> int:
    """Return of how many of the input's pixels one meets each place of the kernel."""
    return given["WINDOW"].stride[0] * given["WINDOW"].stride[1]


IN_PLACE = ("bias_relu_planes_kernel", "dropout_kernel")  # read and write y


def least_seconds(kernel: str, given: Mapping[str, Any], programs: int) -> float:
    """Return the roofline's time of a launch on an H200: each tensor moved once, products at the GPU's highest rate."""
    tensors = {id(each): each for value in given.values() for each in _tensors(value)}
    moved = sum(each.nbytes for each in tensors.values())
    if kernel in IN_PLACE or (kernel == "bn_relu_kernel" and given["x_ptr"] is given["y_ptr"]):
        moved += given["y_ptr"].nbytes
    if kernel == "sgd_kernel":  # reads its tensors' places from a table; master and momentum are read and written
        weight, grad = (given[name].primitive_bitwidth // 8 for name in ("weight_type", "grad_type"))
        moved += programs * given["BLOCK"] * (grad + 2 * 4 * (1 + given["MOMENTUM"]) + 2 * weight * (weight < 4))
    flops = FLOPS[kernel](given) if kernel in FLOPS else 0
    widest = max((each.element_size() for each in tensors.values() if each.dim() == 4), default=2) if flops else 2
    return max(moved / COPY, flops / PRODUCTS[max(widest, 2)])


def _tensors(argument: Any) -> list[Tensor]:
    argument = getattr(argument, "base", argument)  # of a descriptor
    if isinstance(argument, tuple):
        return [each for part in argument for each in _tensors(part)]
    return [argument] if isinstance(argument, Tensor) else []
