"""Devices on which candidates are tried: a clock and candidates for each kind of device. Tests put in their own."""

import ctypes
import functools
import hashlib
import platform
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from fastcnn.backend import only_here
from fastcnn.tuning.candidates import light
from fastcnn.tuning.device import device_name, versions
from fastcnn.tuning.table import Winner
from fastcnn.tuning.timing import Run, Times, seconds_of

LONGEST_SLEEP = 0.02  # seconds that a GPU waits, so that launches queue up before it begins
Watch = Callable[[Winner], AbstractContextManager[None]]  # what a candidate runs in
CLOCK = 2e9  # cycles a second, at the most, of a GPU
THREAD_LOCAL = 1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL: captures in other threads forbid this one nothing


class Place:
    """A processor, whose clock is the wall's.

    Example:
        >>> Place(torch.device("cpu")).by_default
        False
    """

    by_default = False  # whether stages are tried without FASTCNN_TRIAL=1

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @property
    def name(self) -> str:
        """Return the model of the device."""
        return device_name(self.device)

    def light(self, op: str) -> list[Winner]:
        """Return the candidates of an op beside stock."""
        return light(op, self.device)

    def measure(self, run: Run, times: int) -> Times:
        """Return the seconds of a call."""
        seconds = seconds_of(run, times, self.device)
        return Times(seconds, seconds)

    def timer(self, run: Run, watch: Watch) -> Callable[[Winner, int], Times]:
        """Return what measures a candidate's run so many times, within `watch`."""

        def timed(candidate: Winner, times: int) -> Times:
            with watch(candidate), only_here(*candidate):
                run(0)  # plans, and warms caches that others have used meanwhile
                return self.measure(run, times)

        return timed

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
            call = seconds_of(run, times, self.device)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(int(min(call * times, LONGEST_SLEEP) * CLOCK))
            start.record()
            for turn in range(times):
                run(turn)
            end.record()
            end.synchronize()
            return Times(call, start.elapsed_time(end) / 1e3 / times)

    def is_capturing(self) -> bool:
        """Whether this stream is captured into a CUDA graph, or the one that torch.cuda.graph takes in any thread."""
        streams = [torch.cuda.current_stream(self.device), torch.cuda.graph.default_capture_stream]
        return any(_is_captured(each) for each in streams if each is not None)

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Let this thread wait for the GPU while another one captures; by CUDA's rule that would end the capture."""
        driver, mode = ctypes.CDLL("libcuda.so.1"), ctypes.c_int(THREAD_LOCAL)
        driver.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))
        try:
            yield
        finally:
            driver.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))

    def make_room(self) -> None:
        """Let torch's allocator free its unused memory."""
        torch.cuda.empty_cache()

    def _driver(self) -> str:
        file = Path("/proc/driver/nvidia/version")
        return driver_version(file.read_text()) if file.is_file() else ""


def _is_captured(stream: torch.cuda.Stream) -> bool:
    with torch.cuda.stream(stream):
        return torch.cuda.is_current_stream_capturing()


def driver_version(text: str) -> str:
    """Return the version in what NVIDIA's kernel module says of itself, which may name the processor before it.

    Example:
        >>> driver_version("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build")
        '570.86.15'
        >>> driver_version("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19")
        '535.104.05'
    """
    found = re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)", text)
    return found.group(1) if found else ""


PLACES: dict[str, type[Place]] = {"cpu": Place, "cuda": Gpu}


@functools.cache
def place_of(device: torch.device) -> Place | None:
    """Return the place of a device, or None where nothing is tried."""
    kind = PLACES.get(device.type)
    return kind(device) if kind else None


@functools.cache
def _digest() -> str:
    """Return a digest of the kernels' code: the compiled extension, and Triton's sources."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in [*sorted(package.glob("_C.*")), *sorted((package / "triton").rglob("*.py"))]:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
