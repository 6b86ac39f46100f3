"""Time, memory and ceilings: clocks that wait for the device, inputs colder than the cache, rounds within a budget."""

import contextlib
import ctypes
import itertools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch

from benchmarks.roofline import COPY, matmul
from fastcnn.train.memory import peak_memory

T = TypeVar("T")
Work = Callable[[], object]

CPU_CACHE = 64 * 2**20  # bytes that hold a server CPU's share of the last cache; torch does not tell it
MOST_SETS = {"cuda": 256, "cpu": 32}
# A round is long enough that waiting for the device, some 10 us, does not count.
ROUND_SECONDS = {"cuda": 3e-3, "cpu": 5e-3}
ROUNDS = (5, 100)
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h


class Plan(NamedTuple):
    """So many rounds of so many calls."""

    rounds: int
    iterations: int


def keep_freed_memory() -> None:
    """Let glibc's malloc keep what is freed, instead of giving it back to the system and fetching it anew.

    Otherwise a call has no page fault or thousands, which take up to half of its time, as the heap happens to lie.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def clock() -> float:
    """Return the time in seconds once the device has done all its work."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def rotated(make: Callable[[], T], size: int, device: torch.device) -> Iterator[T]:
    """Give, round and round, sets of tensors of `size` bytes, so many that none is still in the cache at its turn."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else CPU_CACHE
    count = min(MOST_SETS[device.type], max(2, math.ceil(2 * cache / max(size, 1))))
    return itertools.cycle([make() for _ in range(count)])


def plan(work: Work, device: torch.device, seconds: float) -> Plan:
    """Warm `work` up and return how to time it for about so many seconds."""
    for _ in range(2):
        work()
    once = _seconds(work, 1)
    if once < ROUND_SECONDS[device.type]:
        once = min(once, _seconds(work, 10))
    iterations = max(1, math.ceil(ROUND_SECONDS[device.type] / once))
    least, most = ROUNDS
    return Plan(max(least, min(most, int(seconds / (once * iterations)))), iterations)


def _seconds(work: Work, calls: int) -> float:
    begin = clock()
    for _ in range(calls):
        work()
    return (clock() - begin) / calls


def peak_bytes(work: Work, device: torch.device) -> int | None:
    """Return the most memory that tensors take during a call, beyond what was held before it."""
    return peak_memory(work, device)


def ceilings(device: torch.device, dtypes: tuple[str, ...]) -> dict[str, float]:
    """Measure what this device can do: large matrix products of random data, and a large copy (read plus written)."""
    sides = {"cuda": 8192, "cpu": 1536}
    size = {"cuda": 2**30, "cpu": 2**28}[device.type]
    found = {matmul(dtype): _matmul_rate(device, dtype, sides[device.type]) for dtype in dtypes}
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return {**found, COPY: 2 * size / _median(lambda: target.copy_(source), device)}


def _matmul_rate(device: torch.device, dtype: str, side: int) -> float:
    kind: Any = {"device": device, "dtype": getattr(torch, dtype)}
    a, b, product = (torch.randn(side, side, **kind) for _ in range(3))
    return 2 * side**3 / _median(lambda: torch.mm(a, b, out=product), device)


def _median(work: Work, device: torch.device) -> float:
    """Return the median seconds of a call: a ceiling that a whole run can hold, not its luckiest moment."""
    rounds, iterations = plan(work, device, 0.3)
    times = sorted(_seconds(work, iterations) for _ in range(min(rounds, 15)))
    return times[len(times) // 2]
