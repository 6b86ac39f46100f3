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
    """Return the model of a GPU or processor; an empty string for a device that nothing is measured on."""
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


def driver() -> str:
    """Return the version of NVIDIA's driver; an empty string where its kernel module does not tell."""
    file = Path("/proc/driver/nvidia/version")
    # "NVIDIA UNIX x86_64 Kernel Module  535.104.05"; the open module names the processor in between.
    found = re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)", file.read_text()) if file.is_file() else None
    return found[1] if found else ""


def file_name(device: str) -> str:
    """Return the file that holds a device's table: nvidia-h200.json."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".json"


@functools.cache
def versions(device_type: str) -> dict[str, str | int | None]:
    """Return the versions that times on a kind of device depend on; of a version its first two numbers."""
    held: dict[str, str | int | None] = {"torch": _minor(torch.__version__), "kernels": KERNELS}
    if device_type == "cuda":
        triton = version_of("triton")
        held |= {"cuda": torch.version.cuda, "triton": _minor(triton) if triton else None}
    return held


def version_of(package: str) -> str | None:
    """Return the version of a package, None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])
