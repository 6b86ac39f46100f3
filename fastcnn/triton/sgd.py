"""One step of SGD with momentum in Triton, over all parameters at once: reads a table of where their tensors are."""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcnn.triton.tiles import ceil_div, power_of_2

BLOCK = 2048
# A parameter of a multiple of so many elements, at addresses that are multiples of so many bytes, goes by vectors.
VECTOR, BYTES = tl.constexpr(8), tl.constexpr(16)


@triton.jit
def pointer(table_ptr, row, which, COUNT: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Return a parameter's pointer from one row of the table."""
    found = tl.load(table_ptr + row * COUNT + which).to(tl.pointer_type(DTYPE))
    return tl.multiple_of(found, BYTES) if ALIGNED else found


@triton.jit
def sgd_kernel(
    table_ptr, lr_ptr, lr, momentum, dampening, weight_decay,
    COUNT: tl.constexpr, weight_type: tl.constexpr, grad_type: tl.constexpr, MOMENTUM: tl.constexpr,
    FIRST: tl.constexpr, NESTEROV: tl.constexpr, MAXIMIZE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Update master and buffer in float32, and the weight of type weight_type that the model computes with.

    table: (6, COUNT), a column a parameter: its first program, its elements, and where weight, gradient, master and
    buffer are. One program does BLOCK elements of one parameter. Where the weight is not the rounded master, it was set
    since the last step: the master takes its value. On the FIRST step the buffer is the gradient. A float32 weight is
    its own master.
    """
    program = tl.program_id(0)
    which = tl.sum((tl.load(table_ptr + tl.arange(0, COUNT)) <= program).to(tl.int32), axis=0) - 1
    first = (program - tl.load(table_ptr + which)) * BLOCK
    at = tl.arange(0, BLOCK)
    elements = tl.load(table_ptr + COUNT + which)
    if ALIGNED:
        elements = tl.multiple_of(elements, VECTOR)
    mask = at < tl.minimum(elements - first, BLOCK).to(tl.int32)
    grad_ptr = pointer(table_ptr, 3, which, COUNT, grad_type, ALIGNED) + first
    master_ptr = pointer(table_ptr, 4, which, COUNT, tl.float32, ALIGNED) + first
    rate = lr if lr_ptr is None else tl.load(lr_ptr).to(tl.float32)
    grad = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
    master = tl.load(master_ptr + at, mask=mask, other=0.0)
    if weight_type != tl.float32:
        weight_ptr = pointer(table_ptr, 2, which, COUNT, weight_type, ALIGNED) + first
        weight = tl.load(weight_ptr + at, mask=mask, other=0.0)
        master = tl.where(weight == master.to(weight_type), master, weight.to(tl.float32))
    if MAXIMIZE:
        grad = -grad
    grad += master * weight_decay
    if MOMENTUM:
        buffer_ptr = pointer(table_ptr, 5, which, COUNT, tl.float32, ALIGNED) + first
        if FIRST:
            velocity = grad
        else:
            velocity = tl.load(buffer_ptr + at, mask=mask, other=0.0) * momentum + grad * (1.0 - dampening)
        tl.store(buffer_ptr + at, velocity, mask=mask)
        grad = grad + velocity * momentum if NESTEROV else velocity
    master -= grad * rate
    tl.store(master_ptr + at, master, mask=mask)
    if weight_type != tl.float32:
        tl.store(weight_ptr + at, master.to(weight_type), mask=mask)


def sgd(
    parameters: list[tuple[Tensor, Tensor, Tensor, Tensor | None]],
    lr: float | Tensor,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
    first: bool,
) -> None:
    """Launch a step over parameters on one device, with the same dtypes; on the `first` the buffers hold nothing.

    Each has weight, gradient, master and buffer, dense in the same memory order: master and buffer are float32, a
    float32 weight is its own master, without momentum there are no buffers. A CUDA graph reads an lr that is a tensor
    on the device anew at each replay.
    """
    weight, grad, _, buffer = parameters[0]
    tensor = isinstance(lr, Tensor)
    rows = [(each[0].numel(), *(0 if one is None else one.data_ptr() for one in each)) for each in parameters]
    with torch.cuda.device_of(weight):
        for wide in (True, False):
            alike = tuple(row for row in rows if row[0] and _is_aligned(row) == wide)
            if alike:
                sgd_kernel[(sum(ceil_div(row[0], BLOCK) for row in alike),)](
                    _table(alike, weight), lr if tensor else None, 0.0 if tensor else lr,
                    momentum, dampening, weight_decay, COUNT=power_of_2(len(alike)),
                    weight_type=_type(weight), grad_type=_type(grad), MOMENTUM=buffer is not None,
                    FIRST=first, NESTEROV=nesterov, MAXIMIZE=maximize, ALIGNED=wide, BLOCK=BLOCK,
                )  # fmt: skip


def _is_aligned(row: tuple[int, ...]) -> bool:
    return row[0] % VECTOR.value == 0 and all(address % BYTES.value == 0 for address in row[1:])


def _type(tensor: Tensor) -> tl.dtype:
    return getattr(tl, str(tensor.dtype).removeprefix("torch."))


def _table(rows: tuple[tuple[int, ...], ...], like: Tensor) -> Tensor:
    """Return the kernel's table on the device of `like`: kept between steps, but for the one that a graph captures."""
    captured = like.is_cuda and torch.cuda.is_current_stream_capturing()
    make = _kept_table.__wrapped__ if captured else _kept_table  # memory and filling belong to the graph
    return make(rows, like.device, torch.cuda.current_stream().cuda_stream if like.is_cuda else 0)


@lru_cache(maxsize=16)
def _kept_table(rows: tuple[tuple[int, ...], ...], device: torch.device, stream: int) -> Tensor:
    """Fill a table by kernels that have its numbers as arguments, which a graph may capture, unlike a copy."""
    programs, numbers = 0, []
    for row in rows:
        numbers.append((programs, *row))
        programs += ceil_div(row[0], BLOCK)
    numbers += [(programs, 0, 0, 0, 0, 0)] * (power_of_2(len(rows)) - len(rows))  # `programs`: no program is theirs
    flat = [number for row in zip(*numbers, strict=True) for number in row]
    table = torch.zeros(len(flat), dtype=torch.int64, device=device)
    torch._foreach_add_(list(table.unbind()), flat)
    return table
