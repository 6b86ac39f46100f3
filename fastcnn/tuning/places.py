"""Devices on which candidates are tried, each kind with its clock. Tests put in their own."""

import ctypes
import functools
import hashlib
import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastcnn.tuning.device import device_name, driver, versions

LONGEST_SLEEP = 0.02  # seconds that a GPU waits, so that launches queue up before it begins
CLOCK = 2e9  # cycles a second, at the most, of a GPU
THREAD_LOCAL = 1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL: captures in other threads forbid this one nothing

Run = Callable[[int], object]  # one call, on the inputs of this turn


class Times(NamedTuple):
    """Seconds of a call: with its launch, as in eager code, and of the device's work alone."""

    call: float
    device: float


class Place:
    """A processor, whose clock is the wall's."""

    by_default = False  # whether stages are tried without FASTCNN_TRIAL=1

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @property
    def name(self) -> str:
        """Return the model of the device."""
        return device_name(self.device)

    def measure(self, run: Run, times: int) -> Times:
        """Return the seconds of a call."""
        seconds = self._by_the_wall(run, times)
        return Times(seconds, seconds)

    def _by_the_wall(self, run: Run, times: int) -> float:
        """Return the mean seconds of so many calls, the device's work included."""
        self._wait()
        begin = time.perf_counter()
        for turn in range(times):
            run(turn)
        self._wait()
        return (time.perf_counter() - begin) / times

    def _wait(self) -> None:
        """Wait for the device's work."""

    def is_capturing(self) -> bool:
        """Whether a graph is being captured, in which nothing may be timed."""
        return False

    def apart(self) -> AbstractContextManager[object]:
        """Return what a trial runs in, so that it leaves the captures of other threads alone."""
        return nullcontext()

    def make_room(self) -> None:
        """Free unused memory, after a call has run out of memory."""

    def identity(self) -> dict[str, Any]:
        """Return what a proof depends on: the device, its driver, the versions and the kernels themselves."""
        held = versions(self.device.type) | {"torch": torch.__version__, "python": platform.python_version()}
        return {"device": self.name, "driver": self._driver(), "build": _digest(), **held}

    def _driver(self) -> str:
        return platform.release()

    def child(self) -> list[str]:
        """Return the command of the process that proves kernels."""
        return [sys.executable, "-m", "fastcnn.tuning.proof", str(self.device)]


class Gpu(Place):
    """A CUDA GPU, whose own clock times the work that queues up behind a pause."""

    by_default = True

    def measure(self, run: Run, times: int) -> Times:
        """Return the seconds of a call, by the wall's clock, and by the GPU's without waiting for launches."""
        with torch.cuda.device(self.device):
            call = self._by_the_wall(run, times)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(int(min(call * times, LONGEST_SLEEP) * CLOCK))
            start.record()
            for turn in range(times):
                run(turn)
            end.record()
            end.synchronize()
            return Times(call, start.elapsed_time(end) / 1e3 / times)

    def _wait(self) -> None:
        torch.cuda.current_stream(self.device).synchronize()  # a transfer elsewhere may be waiting for what follows

    def is_capturing(self) -> bool:
        """Whether this stream is captured into a CUDA graph, or the one that torch.cuda.graph takes in any thread."""
        streams = [torch.cuda.current_stream(self.device), torch.cuda.graph.default_capture_stream]
        return any(_is_captured(each) for each in streams if each is not None)

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Let this thread wait for the GPU while another one captures; by CUDA's rule that would end the capture."""
        cuda, mode = ctypes.CDLL("libcuda.so.1"), ctypes.c_int(THREAD_LOCAL)
        cuda.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))
        try:
            yield
        finally:
            cuda.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))

    def make_room(self) -> None:
        """Let torch's allocator free its unused memory."""
        torch.cuda.empty_cache()

    def _driver(self) -> str:
        return driver()


def _is_captured(stream: torch.cuda.Stream) -> bool:
    with torch.cuda.stream(stream):
        return torch.cuda.is_current_stream_capturing()


PLACES: dict[str, type[Place]] = {"cpu": Place, "cuda": Gpu}


@functools.cache
def place_of(device: torch.device) -> Place:
    """Return the place of a device whose type is in `PLACES`."""
    return PLACES[device.type](device)


@functools.cache
def _digest() -> str:
    """Return a digest of the kernels' code: the compiled extension, and Triton's sources."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in [*sorted(package.glob("_C.*")), *sorted((package / "triton").rglob("*.py"))]:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
