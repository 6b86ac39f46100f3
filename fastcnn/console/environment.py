"""Versions and hardware of the machine, for the record of a run and for bug reports."""

import os
import platform

import torch

import fastcnn
from fastcnn.tuning.device import driver, processor, version_of


def versions() -> dict[str, str]:
    """Return the versions that matter, ``"not installed"`` where a package is missing."""
    found = {"fastcnn": fastcnn.__version__, "python": platform.python_version(), "torch": torch.__version__}
    found |= {package: version_of(package) or "not installed" for package in ("triton", "torchvision", "numpy")}
    found["CUDA of torch"] = torch.version.cuda or "none: a CPU build"
    found["cuDNN of torch"] = str(torch.backends.cudnn.version() or "none")
    return found


def hardware() -> dict[str, str]:
    """Return the machine's processor, threads, GPUs and driver."""
    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    shown = [f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB" for gpu in gpus]
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "CPU": f"{processor()}, {os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads",
        "GPU": "; ".join(shown) or "none that torch can use",
        "NVIDIA driver": driver() or "none",
    }
