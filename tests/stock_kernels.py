"""The kernels of stock torch's library that its ATen operators launch on a GPU, and how often their code runs.

OPERATORS has them by the operator's name, as ATen's sources launch them; their branches are those of torch 2.14's code
for sm_90. Counted is the least that they issue: no border, no slow path, and a block's sums only where said. Zeros that
are written before a gradient are not counted.
"""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton import cdiv as ceil_div

# A type in a kernel's name, as a regular expression.
MANGLED = {torch.bfloat16: r"(?:N\w{2,4}8BFloat16E|S\w?_)", torch.float32: "f"}


class Kernel(NamedTuple):
    """A launch."""

    name: str  # a regular expression found in the mangled name of this kernel alone
    warps: float
    branches: tuple[Any, ...]  # as issue_slots.follow takes them
    bytes: float  # that it moves


def moved(*tensors: Tensor) -> float:
    """Return the bytes of tensors."""
    return sum(each.numel() * each.element_size() for each in tensors)


def dimensions(tensors: list[Tensor]) -> int:
    """Return how many are left of the last tensor's dimensions when TensorIterator has merged what lies in a row."""
    out = tensors[-1]
    sizes, every = out.shape, [each.expand(out.shape).stride() for each in tensors]
    order = sorted((i for i in range(out.dim()) if sizes[i] > 1), key=lambda i: out.stride(i))
    return 1 + sum(
        any(strides[inner] * sizes[inner] != strides[outer] for strides in every)
        for inner, outer in itertools.pairwise(order)
    )


def pointwise(functor: str, *inside: float) -> Callable[..., list[Kernel]]:
    """Return the kernels of an elementwise operator, given its inputs and its output.

    A thread computes eight elements in a row, by accesses of 16 bytes, where all tensors lie alike. Elsewhere it has
    four elements of two bytes, or two of four, a block's width apart, with a division for each dimension.
    """

    def kernels(*tensors: Tensor) -> list[Kernel]:
        out = tensors[-1]
        name, size = functor.format(T=MANGLED[out.dtype]), out.element_size()
        found = dimensions(list(tensors))
        if found == 1:
            name = f"29vectorized_elementwise_kernelILi{16 // size}E{name}.*Lb0EE"
            return [Kernel(name, out.numel() / (8 * 32), (1, *inside), moved(*tensors))]
        each = 8 // size
        name = f"18elementwise_kernelILi128ELi{each}EZNS0_22gpu_kernel_impl_nocastI{name}"
        branches = each * (0, *found * (0,), 1)  # in range; so many dimensions, and no more
        return [Kernel(name, out.numel() / (each * 32), branches, moved(*tensors))]

    return kernels


BINARY = "NS0_13BinaryFunctorI{T}{T}{T}"
relu = pointwise(r"Z\w*launch_clamp_scalar\w*EUl{T}E_", 1)  # of its three ways, the one with a minimum
threshold = pointwise(BINARY + r"Z\w*threshold_kernel_implI")
add = pointwise("NS0_15CUDAFunctor_addI{T}E")
add_scalar = pointwise("NS0_21CUDAFunctorOnSelf_addI{T}E")
multiply = pointwise(BINARY + "NS0_15binary_internal10MulFunctorIfE")
multiply_scalar = pointwise("NS0_13BUnaryFunctorI{T}{T}{T}NS0_15binary_internal10MulFunctorIfE")
divide = pointwise(BINARY + "NS0_15binary_internal10DivFunctorI{T}E")
power = pointwise(r"ZNS0_\w*pow_tensor_scalar_kernel_implI{T}{T}E\w*EUl{T}E2_", 0, *8 * (1,))  # no special values
negate = pointwise(r"ZZZNS0_15neg_kernel_cuda\w*EUl{T}E_")
copy = pointwise(r"ZZZNS0_23direct_copy_kernel_cuda\w*EUl{T}E_")
fill = pointwise("NS0_11FillFunctorI{T}E")


def scaled(x: Tensor, other: Any, out: Tensor) -> list[Kernel]:
    return multiply(x, other, out) if isinstance(other, Tensor) else multiply_scalar(x, out)


def added(x: Tensor, other: Any, out: Tensor) -> list[Kernel]:
    return add(x, other, out) if isinstance(other, Tensor) else add_scalar(x, out)


def padded(x: Tensor, pads: list[int], *rest: Any) -> list[Kernel]:
    """Return the kernels that pad, or cut off, channels."""
    out, start = rest[-1], pads[4]
    if start > 0:
        return [*fill(out), *copy(x, out.narrow(2, start, x.shape[2]))]
    return copy(x.narrow(2, -start, out.shape[2]), out)


def is_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last)


def summed(x: Tensor, dims: list[int], out: Tensor) -> list[Kernel]:
    """Return the sum over all but channels, without what adds up the threads' sums.

    A pass takes four rows of four channels (NHWC), or four pixels, with a division for each (NCHW). Every thread is to
    have at least sixteen values, and a multiprocessor all its threads.
    """
    values = x.numel() // x.shape[1]
    if is_last(x):
        vector, threads, name = 4, 128, "128ELi4"
        width = min(power_of_2(x.shape[1] // vector), 32)
        grid, values = ceil_div(x.shape[1] // vector, width), ceil_div(values, threads // width)
        branches: tuple[Any, ...] = (1, 0, 1, 0, 1, 0)
    else:
        vector, threads, name = 1, 512, "512ELi1"
        grid, values = x.shape[1], ceil_div(values, threads)
        branches = (0, 1, 0, 1, 0, 0, 0, *4 * (0, 1))
    if values >= 256:
        most = ceil_div(132 * 2048 // threads, grid)
        shares = max(min(most, ceil_div(values, 16)), ceil_div(values, 256))
        grid *= shares
    warps = grid * threads / 32
    name = f"13reduce_kernelILi{name}ENS0_8ReduceOpI{{T}}NS0_14func_wrapper_tI{{T}}Z\\w*11sum_functorI{{T}}f{{T}}E"
    loop = x.numel() / (32 * 4 * vector * warps)
    return [Kernel(name.format(T=MANGLED[x.dtype]), warps, (*branches, loop, ...), moved(x, out))]


def power_of_2(n: int) -> int:
    """Return the largest one up to n."""
    return 1 << (n.bit_length() - 1)


class Blocks(NamedTuple):
    """How the pools in channels_last share out their tensor: ATen's blocks of up to 1024 threads."""

    warps: float
    channels: int  # passes of a thread over channels
    rows: float  # of a thread, and of each the columns
    columns: float


def blocks(x: Tensor) -> Blocks:
    """Return them for a tensor of which each thread has some places."""
    images, channels, height, width = x.shape
    across = min(power_of_2(channels), 32)
    y = min(power_of_2(width), 1024 // across)
    z = min(power_of_2(height), 1024 // across // y)
    across = min(power_of_2(channels), 1024 // y // z)
    parts = ceil_div(channels, 4 * across)
    grid = images * parts * ceil_div(width, 2 * y) * ceil_div(height, 2 * z)
    rows, columns = height / (ceil_div(height, 2 * z) * z), width / (ceil_div(width, 2 * y) * y)
    return Blocks(grid * across * y * z / 32, ceil_div(channels, across * parts), rows, columns)


def pool(x: Tensor, sides: list[int], stride: list[int], out: tuple[Tensor, Tensor]) -> list[Kernel]:
    """Return the maximum of windows: a thread has an output (NCHW), or some places and channels (NHWC)."""
    y, codes = out
    side, name = sides[0], r"21max_pool_forward_{}I{}iE"
    if not is_last(x):
        branches: tuple[float, ...] = (1, 1, 0, 0, side, side, 1)
        return [Kernel(name.format("nchw", MANGLED[x.dtype]), y.numel() / 32, branches, moved(x, y, codes))]
    warps, channels, rows, columns = blocks(y)
    branches = (0, channels, 0, 1, 1, 0, 0, 0, channels, side, side, 0, channels, columns, rows)
    return [Kernel(name.format("nhwc", MANGLED[x.dtype]), warps, branches, moved(x, y, codes))]


def unpool(grad: Tensor, x: Tensor, sides: list[int], *rest: Any) -> list[Kernel]:
    """Return its gradient: a thread has a pixel (NCHW), or some and their channels (NHWC).

    Where windows of three overlap, a pixel lies in one and a half of an axis, those in more than one (three quarters
    of the pixels) in 8 / 5 of a row's and 5 / 3 of a column's.
    """
    codes, out = rest[-2:]
    overlap, name = sides[0] > 2, r"22max_pool_backward_{}I{}"
    if not is_last(x):
        first = (0, 1) if overlap else (1,)  # of a row's windows, one by one; then none is left
        branches: tuple[float, ...] = (0, 0, 0, 0, 0, 0, 0, *first[:1], *(0, 1) * overlap, 1, 1 + overlap / 2, 1, 1, 1)
        warps = x.shape[0] * x.shape[1] * ceil_div(x.shape[2] * x.shape[3], 32)
        return [Kernel(name.format("nchw", MANGLED[x.dtype] + "fiE"), warps, branches, moved(grad, codes, out))]
    warps, channels, rows, columns = blocks(x)
    alone, many = (0, channels), (0, 0, 0, 0, channels, 8 / 5, 5 / 3, 0, channels)
    which = (0.75, *alone, *many) if overlap else (0, *alone)
    branches = (0, channels, 0, 0, 0, *which, columns, rows)
    return [Kernel(name.format("nhwc", MANGLED[x.dtype] + "fE"), warps, branches, moved(grad, codes, out))]


def averaged(x: Tensor, sides: list[int], stride: list[int], out: Tensor) -> list[Kernel]:
    """Return the mean of so many channels: a thread has a value."""
    name = f"29avg_pool3d_cuda_update_outputILi1E{MANGLED[x.dtype]}f"
    return [Kernel(name, rows_of_32(out), (0, 1, 0, 1, 1, 1, sides[0]), moved(x, out))]


def averaged_backward(grad: Tensor, x: Tensor, sides: list[int], *rest: Any) -> list[Kernel]:
    """Return its gradient, of tensors that are made contiguous before."""
    out = rest[-1]
    name = f"44avg_pool3d_single_backward_out_frame_stride1I{MANGLED[x.dtype]}f"
    windows = sides[0] * grad.shape[2] / out.shape[2]
    contiguous = torch.empty(grad.shape, dtype=grad.dtype, device="meta")
    first = [] if grad.is_contiguous() else copy(grad, contiguous)
    return [*first, Kernel(name, rows_of_32(out), (0, 0, 0, 0, 1, 1, 1, windows), moved(grad, out))]


def rows_of_32(x: Tensor) -> float:
    """Return the warps where each has up to 32 pixels of one row."""
    return x.numel() // x.shape[-1] * ceil_div(x.shape[-1], 32)


def passes(length: int, threads: int) -> float:
    """Return how often a block's warps go through a loop over so many elements, on average."""
    warps = threads // 32
    return sum(ceil_div(max(length - 32 * warp, 0), threads) for warp in range(warps)) / warps


def by_rows(x: Tensor) -> tuple[float, float]:
    """Return the warps of batch norm's kernels in channels_last, 32 channels wide and 16 rows high; a thread's rows."""
    images, channels, height, width = x.shape
    shares = min(ceil_div(images * height * width, 16 * 16), 128)
    return channels // 32 * shares * 16, images * height * width / (16 * shares)


def statistics(x: Tensor) -> list[Kernel]:
    """Return batch norm's mean and variance; in channels_last without what adds up the threads' sums."""
    if is_last(x):
        warps, rows = by_rows(x)
        name = r"50batch_norm_\w*statistics_channels_last_kernelINS0_3VarE{T}f"
        branches: tuple[Any, ...] = (0, 0, 0, 0, 0, rows / 4, ...)
    else:
        warps, plane = x.shape[1] * 16, passes(x.shape[2] * x.shape[3], 512)
        name, branches = r"36batch_norm_\w*statistics_kernelINS0_3VarE{T}\w*fiE", (0, 0, plane, x.shape[0], ...)
    return [Kernel(name.format(T=MANGLED[x.dtype]), warps, branches, moved(x))]


def normalized(x: Tensor, *rest: Any) -> list[Kernel]:
    """Return batch norm by given statistics."""
    images, channels, height, width = x.shape
    if is_last(x):
        warps, rows = by_rows(x)
        name, branches = r"47batch_norm_transform_input_channels_last_kernelI{T}ffLi4E", (1, 0, 0, rows / 4)
    else:
        threads = next(n for n in (32, 64, 128, 256, 512) if height * width // 4 <= n or n == 512)
        warps, plane = channels * images * threads / 32, passes(height * width, threads)
        name, branches = r"33batch_norm_transform_input_kernelI{T}ffLb1EiE", (0, plane, 1)
    return [Kernel(name.format(T=MANGLED[x.dtype]), warps, branches, 2 * moved(x))]


def normalized_backward(grad: Tensor, x: Tensor, *rest: Any) -> list[Kernel]:
    """Return batch norm's gradient: sums, then the input's; two kernels in channels_last, and one in NCHW."""
    if is_last(x):
        warps, rows = by_rows(x)
        sums = r"47batch_norm_backward_reduce_channels_last_kernelILi4E{T}ffE"
        each = r"46batch_norm_backward_elemt_channels_last_kernelILi4E{T}ffEE\w*PS4_S7_ii$"
        mangled, loop = MANGLED[x.dtype], rows // 8  # eight rows at once; the few that are left are not counted
        return [
            Kernel(sums.format(T=mangled), warps, (0, 0, loop, ...), 2 * moved(x)),
            Kernel(each.format(T=mangled), warps, (0, loop, ...), 3 * moved(x)),
        ]
    images, channels, height, width = x.shape
    loops = (0, passes(height * width, 512), images)
    name = f"26batch_norm_backward_kernelI{MANGLED[x.dtype]}ffiE"
    branches = (0, 0, *loops, 15 / 16, 0, 0, *loops)  # one of sixteen warps adds up the others' sums
    return [Kernel(name, channels * 16, branches, 5 * moved(x))]


# By name, given an operator's arguments and its result.
OPERATORS: dict[str, Callable[..., list[Kernel]]] = {
    "relu": relu,
    "threshold_backward": lambda grad, x, _, out: threshold(grad, x, out),
    "add": added,
    "add_": added,
    "mul": scaled,
    "div": divide,
    "pow": lambda x, _, out: power(x, out),
    "neg": negate,
    "sum": summed,
    "constant_pad_nd": padded,
    "avg_pool3d": averaged,
    "avg_pool3d_backward": averaged_backward,
    "max_pool2d_with_indices": pool,
    "max_pool2d_with_indices_backward": unpool,
    "native_batch_norm": normalized,
    "native_batch_norm_backward": normalized_backward,
}
NO_KERNEL = {"view", "squeeze", "unsqueeze", "detach", "empty"}


class Launched(TorchDispatchMode):
    """Collects the kernels of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[Kernel] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        self.kernels += [] if name in NO_KERNEL else OPERATORS[name](*args, out)
        return out


def launched(run: Callable[[], Any]) -> list[Kernel]:
    """Return the kernels of what runs."""
    with Launched() as mode:
        run()
    return mode.kernels
