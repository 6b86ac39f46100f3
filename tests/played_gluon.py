"""Play the Gluon kernel on the CPU from its own source: its warps as threads, barriers and copies in the worst order.

Gluon has no interpreter. Here the functions of triton/convolution/warp_specialized.py run as plain Python over tensors.
Matrix products and copies out read shared memory as late as the kernel's waits allow, copies in write it as early as
its barriers allow: a place that is freed too soon, a phase that is off by one or a missing wait gives wrong results or
stands still. Layouts, and fences between the proxies of memory, are not played: the compiler and a GPU see those.
"""

import threading
from collections.abc import Callable, Sequence
from types import FunctionType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fastcnn.shapes import RELU_OFF
from fastcnn.triton.convolution import hopper, warp_specialized
from fastcnn.triton.convolution.hopper import Boxed

STANDSTILL = 20.0  # seconds
KERNEL = {name: getattr(warp_specialized, name) for name in ("copy_warp", "matrix_warps", "warp_specialized_kernel")}


class Shared:
    """Shared memory: a view that can be indexed, reshaped and permuted; NaN until it is written."""

    def __init__(self, view: Tensor) -> None:
        self.view = view

    def index(self, place: int) -> "Shared":
        assert 0 <= place < self.view.shape[0]
        return Shared(self.view[place])

    def reshape(self, shape: Sequence[int]) -> "Shared":
        return Shared(self.view.view(*shape))

    def permute(self, order: Sequence[int]) -> "Shared":
        return Shared(self.view.permute(*order))

    def store(self, value: Tensor) -> None:
        assert value.shape == self.view.shape
        assert value.dtype == self.view.dtype
        self.view.copy_(value)


class Descriptor:
    """A tensor for the copy engine: reads zero outside, writes nothing there."""

    def __init__(self, boxed: Boxed) -> None:
        self.tensor = boxed.base.as_strided(boxed.shape, boxed.strides)
        self.box, self.dtype, self.layout = boxed.box, boxed.base.dtype, None
        count = torch.Size(boxed.box).numel()
        self.block_type = SimpleNamespace(shape=list(boxed.box), nbytes=count * boxed.base.element_size())

    def _inside(self, at: Sequence[int]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        ends = [min(start + box, size) for start, box, size in zip(at, self.box, self.tensor.shape, strict=True)]
        mine = tuple(slice(max(start, 0), max(end, 0)) for start, end in zip(at, ends))
        boxes = tuple(slice(max(start, 0) - start, max(end, 0) - start) for start, end in zip(at, ends))
        return mine, boxes

    def read(self, at: Sequence[int]) -> Tensor:
        mine, boxes = self._inside(at)
        value = torch.zeros(self.box, dtype=self.dtype)
        part = self.tensor[mine]
        if part.numel():
            value[boxes] = part
        return value

    def write(self, at: Sequence[int], value: Tensor) -> None:
        mine, boxes = self._inside(at)
        if self.tensor[mine].numel():
            self.tensor[mine] = value[boxes]


class Barrier:
    """An mbarrier: a phase ends when all have arrived and all bytes have come."""

    def __init__(self, count: int) -> None:
        self.count = self.awaited = count
        self.bytes = 0
        self.phase = 0

    def settle(self) -> None:
        if self.awaited == 0 and self.bytes == 0:
            self.awaited, self.phase = self.count, self.phase + 1


class Program:
    """One program: its barriers, and the work of the tensor cores and the copy engine that is underway."""

    def __init__(self, number: int, programs: int, num_warps: int) -> None:
        self.number, self.programs, self.num_warps = number, programs, num_warps
        self.changed = threading.Condition()
        self.barriers: dict[int, Barrier] = {}
        self.products: list[Callable[[], object]] = []
        self.stores: list[Callable[[], object]] = []
        self.failure: BaseException | None = None

    def barrier(self, place: Shared) -> Barrier:
        return self.barriers[place.view.data_ptr()]

    def init(self, place: Shared, count: int) -> None:
        self.barriers[place.view.data_ptr()] = Barrier(count)

    def expect(self, place: Shared, count: int) -> None:
        self._change(place, awaited=-1, bytes=count)

    def arrive(self, place: Shared, count: int = 1, pred: bool = True) -> None:
        if pred:
            self._change(place, awaited=-count)

    def _change(self, place: Shared, awaited: int = 0, bytes: int = 0) -> None:
        with self.changed:
            barrier = self.barrier(place)
            barrier.awaited += awaited
            barrier.bytes += bytes
            assert barrier.awaited >= 0, "more arrivals than were announced"
            barrier.settle()
            self.changed.notify_all()

    def wait(self, place: Shared, parity: int) -> None:
        with self.changed:
            barrier = self.barrier(place)
            self.changed.wait_for(lambda: self.failure or barrier.phase % 2 != parity, STANDSTILL)
            if self.failure or barrier.phase % 2 == parity:
                raise RuntimeError("the kernel stands still") from self.failure

    def copy_in(self, source: Descriptor, at: Sequence[int], place: Shared, target: Shared) -> None:
        target.store(source.read(at).view(target.view.shape))
        self._change(place, bytes=-source.block_type.nbytes)

    def copy_out(self, target: Descriptor, at: Sequence[int], source: Shared) -> None:
        self.stores.append(lambda: target.write(at, source.view))

    def multiply(self, a: Shared, b: Shared, acc: Tensor, is_async: bool) -> Tensor:
        assert is_async
        self.products.append(lambda: acc.add_(a.view.float() @ b.view.float()))
        return acc

    def wait_products(self, num_outstanding: int, deps: tuple[Tensor]) -> Tensor:
        self._finish(self.products, num_outstanding)
        return deps[0]

    def wait_stores(self, pendings: int) -> None:
        self._finish(self.stores, pendings)

    @staticmethod
    def _finish(work: list[Callable[[], object]], left: int) -> None:
        while len(work) > left:
            work.pop(0)()

    def specialize(self, parts: Sequence[tuple[Callable[..., None], tuple[Any, ...]]], *_: Any) -> None:
        def run(function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
            try:
                with torch.no_grad():  # every thread has a mode of its own
                    function(*arguments)
            except BaseException as failure:
                with self.changed:
                    self.failure = self.failure or failure
                    self.changed.notify_all()

        threads = [threading.Thread(target=run, args=part) for part in parts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self.failure:
            raise self.failure
        assert not self.products, "products that nobody waited for"
        assert not self.stores, "copies out that nobody waited for"
        assert all(barrier.bytes == 0 for barrier in self.barriers.values())


def _language(program: Program) -> SimpleNamespace:
    def allocate(dtype: torch.dtype, shape: Sequence[int], layout: Any) -> Shared:
        poison = float("nan") if dtype.is_floating_point else 1
        return Shared(torch.full(tuple(shape), poison, dtype=dtype))

    def load(pointer: tuple[Tensor, Tensor], mask: Tensor, other: float) -> Tensor:
        values, at = pointer
        return torch.where(mask, values[torch.where(mask, at, 0)], other)

    return SimpleNamespace(
        program_id=lambda axis: program.number,
        num_programs=lambda axis: program.programs,
        num_warps=lambda: program.num_warps,
        allocate_shared_memory=allocate,
        warp_specialize=program.specialize,
        load=load,
        zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
        arange=lambda start, end, layout: torch.arange(start, end),
        cdiv=lambda a, b: -(-a // b),
        where=torch.where,
        static_range=range,
        maximum=max,
        minimum=min,
        reshape=torch.reshape,
        permute=torch.permute,
        split=lambda value: value.unbind(-1),
        NVMMADistributedLayout=lambda **_: None,
        SliceLayout=lambda *_: None,
        **{name: getattr(torch, name) for name in ("float32", "int64", "uint8")},
    )


class _Pointer:
    def __init__(self, values: Tensor) -> None:
        self.values = values

    def __add__(self, at: Tensor) -> tuple[Tensor, Tensor]:
        return self.values, at


def _play(program: Program) -> Callable[..., None]:
    """Return the kernel as a Python function that runs one program."""
    language = _language(program)
    shared = {**vars(hopper), "tl": language, "OFF": RELU_OFF}
    for name in ("inside", "taps", "tile_start", "later_wins", "finish_pool"):
        shared[name] = FunctionType(getattr(hopper, name).fn.__code__, shared)
    ours = {
        **vars(warp_specialized),
        **{name: shared[name] for name in ("taps", "tile_start", "finish_pool")},
        "gl": language,
        "mbarrier": SimpleNamespace(
            MBarrierLayout=lambda: None,
            **{name: getattr(program, name) for name in ("init", "expect", "arrive", "wait")},
        ),
        "tma": SimpleNamespace(
            async_copy_global_to_shared=program.copy_in,
            async_copy_shared_to_global=program.copy_out,
            store_wait=program.wait_stores,
        ),
        "fence_async_shared": lambda: None,
        "warpgroup_mma": program.multiply,
        "warpgroup_mma_wait": program.wait_products,
    }
    for name, function in KERNEL.items():
        ours[name] = FunctionType(function.fn.__code__, ours)
    return ours["warp_specialized_kernel"]


class PlayedKernel:
    """Stands in for `warp_specialized_kernel`: a launch plays its programs one after another."""

    launches = 0

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        def launch(*args: Any, num_warps: int, maxnreg: int, **constants: Any) -> None:
            self.launches += 1
            given = [_Pointer(each) if isinstance(each, Tensor) else each for each in args]
            for number in range(grid[0]):
                _play(Program(number, grid[0], num_warps))(*given, **constants)

        return launch
