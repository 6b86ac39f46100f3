"""What a measured time depends on besides the call: the device and the versions."""

import functools
import importlib.metadata
import platform
import re
from pathlib import Path

import torch

# Raise it when a kernel gets slower, or when an algorithm's or configuration's name comes to mean something else. What
# makes kernels faster, and what adds configurations, leaves every entry true.
KERNELS = 1


def device_name(device: torch.device) -> str:
    """Return the model of a GPU or processor; an empty string for a device that nothing is measured on.

    Example:
        >>> device_name(torch.device("meta"))
        ''
    """
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return processor() if device.type == "cpu" else ""


@functools.cache
def processor() -> str:
    """Return the model of this machine's processor."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def file_name(device: str) -> str:
    """Return the file that holds a device's table.

    Example:
        >>> file_name("NVIDIA H200")
        'nvidia-h200.json'
    """
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".json"


@functools.cache
def versions(device_type: str) -> dict[str, str | int | None]:
    """Return the versions that times on a kind of device depend on; of a version its first two numbers.

    Example:
        >>> versions("cpu")["torch"] == ".".join(torch.__version__.split(".")[:2])
        True
    """
    held: dict[str, str | int | None] = {"torch": _minor(torch.__version__), "kernels": KERNELS}
    if device_type == "cuda":
        held |= {"cuda": torch.version.cuda, "triton": _triton_version()}
    return held


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def _triton_version() -> str | None:
    try:
        return _minor(importlib.metadata.version("triton"))
    except importlib.metadata.PackageNotFoundError:
        return None
