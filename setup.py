"""Build fastcnn._C, the compiled kernels: for the CPU where torch and a C++ compiler are, for CUDA where nvcc is too.

FASTCNN_BUILD_CUDA=auto|0|1: whether CUDA is built; TORCH_CUDA_ARCH_LIST: for which GPUs; MAX_JOBS: how much at once.
One build serves Python >= 3.11 (limited API) and torch >= 2.11 (ABI-stable LibTorch).
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from glob import glob
from pathlib import Path

from setuptools import setup

TORCH = (2, 11)
CUDA = (12, 8)
ARCHITECTURES = "8.0;9.0a;10.0;12.0+PTX"
FLAGS = ["-O3", "-g0", "-std=c++20", "-fvisibility=hidden"]
CPU_FLAGS = [
    *("-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wextra", "-Wno-unused-parameter"),  # torch has them
    "-ffp-contract=off",  # a loop's vectors and its rest must round alike: equal inputs, equal outputs
]
CUDA_FLAGS = ["-O3", "-std=c++20", "-Xcompiler=-fvisibility=hidden"]


def say(what: str, reason: str) -> None:
    """Tell in one line what the build leaves out, and why."""
    print(f"fastcnn: {what} left out: {reason}", file=sys.stderr)


def missing() -> str:
    """Say what the extension cannot be built without, or return an empty string."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))[0]
    if not shutil.which(compiler):
        return f"no C++ compiler ({compiler}): install g++ 12 or later, or set CXX"
    try:
        import torch
    except ImportError:
        return "no torch: install torch first, then build with --no-build-isolation"
    found = tuple(int(part) for part in torch.__version__.split(".")[:2])
    return "" if found >= TORCH else f"torch {torch.__version__}, needs {TORCH[0]}.{TORCH[1]} or later"


def find_toolkit() -> Path | None:
    """Return the CUDA toolkit's folder: where include/cuda_runtime.h is; an nvcc on PATH may be a wrapper elsewhere."""
    named = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    nvcc = shutil.which("nvcc")
    guesses = [Path(nvcc).resolve().parents[1]] if nvcc else []
    folders = [*(Path(name) for name in named if name), *guesses, Path("/usr/local/cuda")]
    found = [f for f in folders if (f / "include/cuda_runtime.h").is_file() and (f / "bin/nvcc").is_file()]
    return found[0] if found else None


def toolkit_version(toolkit: Path) -> tuple[int, int]:
    """Return nvcc's (major, minor)."""
    said = subprocess.run([toolkit / "bin/nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    major, minor = re.search(r"release (\d+)\.(\d+)", said).groups()
    return int(major), int(minor)


def no_cuda(toolkit: Path | None) -> str:
    """Say why CUDA cannot be built, and what to install, or return an empty string."""
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} has no CUDA: install a CUDA build of torch"
    wanted = torch.version.cuda.split(".")[0]
    if toolkit is None:
        return f"no nvcc: install the CUDA {wanted} toolkit, or set CUDA_HOME to where its include/cuda_runtime.h is"
    version = toolkit_version(toolkit)
    if version < CUDA:
        return f"nvcc {version[0]}.{version[1]} is too old: install CUDA {CUDA[0]}.{CUDA[1]} or later"
    if version[0] != int(wanted):
        return (
            f"nvcc is of CUDA {version[0]}, torch of CUDA {wanted}: install the CUDA {wanted} toolkit, or set CUDA_HOME"
        )
    return ""


def chosen_toolkit() -> Path | None:
    """Return the toolkit to build CUDA with, or None to build without, as FASTCNN_BUILD_CUDA says."""
    choice = os.environ.get("FASTCNN_BUILD_CUDA", "auto")
    if choice not in ("auto", "0", "1"):
        raise SystemExit(f"fastcnn: FASTCNN_BUILD_CUDA: expected auto, 0 or 1, got {choice!r}")
    if choice == "0":
        return None
    toolkit = find_toolkit()
    reason = no_cuda(toolkit)
    if reason and choice == "1":
        raise SystemExit(f"fastcnn: FASTCNN_BUILD_CUDA=1, but {reason}")
    if reason:
        say("the CUDA kernels are", reason)
    return None if reason else toolkit


def extension() -> dict[str, object]:
    """Return setup's arguments that build the extension."""
    toolkit = chosen_toolkit()
    if toolkit:
        os.environ["CUDA_HOME"] = str(toolkit)  # torch looks for it when the next line runs
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ARCHITECTURES)
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    define = [
        ("FASTCNN_TORCH", f"{TORCH[0]}.{TORCH[1]}"),
        ("TORCH_TARGET_VERSION", f"0x{TORCH[0]:02x}{TORCH[1]:02x}000000000000ULL"),
        ("TORCH_STABLE_ONLY", None),
    ]
    sources = ["csrc/module.cpp", "csrc/ops.cpp", *glob("csrc/cpu/*.cpp")]
    if toolkit:
        architectures = ":".join(re.split("[; ]+", os.environ["TORCH_CUDA_ARCH_LIST"]))  # nvcc splits at commas
        version = ".".join(map(str, toolkit_version(toolkit)))
        define += [("USE_CUDA", None), ("FASTCNN_CUDA", version), ("FASTCNN_ARCHITECTURES", architectures)]
        sources += glob("csrc/cuda/*.cu")
    module = (CUDAExtension if toolkit else CppExtension)(
        "fastcnn._C",
        sorted(sources),
        depends=glob("csrc/**/*.*h", recursive=True),
        define_macros=define,
        extra_compile_args={"cxx": FLAGS + CPU_FLAGS, "nvcc": CUDA_FLAGS},
        py_limited_api=True,
    )
    return {
        "ext_modules": [module],
        "cmdclass": {"build_ext": BuildExtension},
        "options": {"bdist_wheel": {"py_limited_api": "cp311"}},
    }


if reason := missing():
    say("the compiled kernels (fastcnn._C) are", reason)
setup(**({} if reason else extension()))
