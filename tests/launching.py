"""Run the Triton launchers on tensors of the meta device, where a kernel's launch becomes whatever a test makes of it.

Must run without TRITON_INTERPRET, in a process of its own: Triton gets a driver that only names its GPU.
"""

import importlib
import os
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

CUOBJDUMP = os.path.join(os.path.dirname(triton.__file__), "backends/nvidia/bin/cuobjdump")
FOLDER = Path(__file__).parents[1] / "fastcnn" / "triton"


class Driver:
    """Stands in for a GPU's driver, so that Triton specializes and compiles as it would for a launch there."""

    architecture = 90

    def get_current_device(self) -> int:
        return self.architecture

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")


class Launch:
    """Stands in for a kernel: passes its launches on."""

    def __init__(self, kernel: Any, take: Callable[..., None]) -> None:
        self.kernel, self.take = kernel, take

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *args, **kwargs: self.take(self.kernel, grid, args, kwargs)


def intercept(take: Callable[..., None]) -> tuple[Driver, dict[str, ModuleType]]:
    """Put the driver in place, and `take(kernel, grid, args, kwargs)` in the place of every launch.

    Returns the driver, whose architecture may be changed, and fastcnn's Triton modules by their last name.
    """
    driver = Driver()
    triton.runtime.driver.set_active(driver)
    paths = [path.relative_to(FOLDER).with_suffix("") for path in FOLDER.rglob("*.py") if path.stem != "__init__"]
    modules = {path.name: importlib.import_module(".".join(("fastcnn.triton", *path.parts))) for path in sorted(paths)}
    for module in modules.values():
        for name, value in vars(module).copy().items():
            if name.endswith("_kernel"):
                setattr(module, name, Launch(value, take))
    return driver, modules


def dump(binary: Any, option: str) -> str:
    """Return what cuobjdump says of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        return subprocess.run([CUOBJDUMP, option, file.name], capture_output=True, text=True, check=True).stdout
