"""Versions, hardware, tables and proofs of the machine, for the record of a run and for bug reports."""

import os
import platform
from collections.abc import Iterator

import torch

import fastcnn
from fastcnn.tuning import proof, table
from fastcnn.tuning.device import device_name, driver, processor, version_of
from fastcnn.tuning.device import versions as device_versions
from fastcnn.tuning.places import place_of


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


def tables_and_proofs() -> Iterator[tuple[str, str]]:
    """Yield names and texts: each table with its entries, and the proof, for each kind of device that is here once."""
    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    for name, device in {device_name(each): each for each in [torch.device("cpu"), *devices]}.items():
        yield "tuning table", _entries(name, device)
        yield "kernels proved", _proof(device)


def _entries(name: str, device: torch.device) -> str:
    path = table.user_path(name)
    try:
        entries = list(table.read(path, name).values())
        shipped = len(table.read(table.shipped_path(name), name))
    except table.Unreadable as reason:
        return f"{path} is ignored: {reason}"
    now = device_versions(device.type)
    mine = [each for each in entries if each["key"].get("versions") == now]
    others = f", {len(entries) - len(mine)} of other versions" if len(mine) < len(entries) else ""
    tried = sum(each.get("by") == "trial" for each in mine)
    kernels = sum(each["backend"] != "torch" for each in mine)
    how = f" ({tried} by trials; kernels win {kernels})" if mine else ""
    with_versions = ", ".join(f"{key} {value}" for key, value in now.items() if value is not None)
    also = f"; {shipped} shipped" if shipped else ""
    return f"{name}: {len(mine)} entries{how} with {with_versions}{others}{also}: {path}"


def _proof(device: torch.device) -> str:
    place = place_of(device)
    verdicts = proof.read(proof.path_of(place.name), place.identity())
    if not verdicts:
        return f"{place.name}: not yet with this build: the first trial does so"
    out = [f"{kernel} is left out: {problem}" for kernel, problem in verdicts.items() if problem]
    return "; ".join([f"{place.name}: {len(verdicts) - len(out)} of {len(verdicts)}", *out])
