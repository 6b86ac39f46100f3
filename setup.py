"""Build fastcnn._C, the compiled kernels: for the CPU where torch and a C++ compiler are, for CUDA where nvcc is too.

FASTCNN_BUILD_CUDA=auto|0|1: whether CUDA is built; TORCH_CUDA_ARCH_LIST: for which GPUs, the machine's own unless set;
MAX_JOBS: how much at once.
One build serves Python >= 3.11 (limited API) and torch >= 2.11 (ABI-stable LibTorch).
And fastcnn._front, which runs planned calls, for this Python and this torch; Python runs them where it is missing.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from glob import glob
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from setuptools import Extension, setup

TORCH = (2, 11)
OLDEST_CUDA = (12, 8)
OLDEST_GPU = (8, 0)  # the compute capability that the kernels need
ARCHITECTURES = ("8.0", "9.0", "10.0+PTX", "12.0")  # where no GPU is; later ones compile the PTX
FAMILIES = {"Ampere": "8.0;8.6", "Ampere+Tegra": "8.7", "Ada": "8.9", "Hopper": "9.0", "Blackwell": "10.0;12.0"}
FLAGS = ["-O3", "-g0", "-std=c++20", "-fvisibility=hidden"]
CPU_FLAGS = [
    *("-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wextra", "-Wno-unused-parameter"),  # torch has them
    "-ffp-contract=off",  # a loop's vectors and its rest must round alike: equal inputs, equal outputs
]
CUDA_FLAGS = ["-O3", "-std=c++20", "-Xcompiler=-fvisibility=hidden"]


def say(what: str) -> None:
    """Tell something in one line, which pip shows under -v."""
    print(f"fastcnn: {what}", file=sys.stderr)


def choice() -> str:
    """Return whether CUDA shall be built: auto, 0 or 1."""
    chosen = os.environ.get("FASTCNN_BUILD_CUDA", "auto")
    if chosen not in ("auto", "0", "1"):
        raise SystemExit(f"fastcnn: FASTCNN_BUILD_CUDA: expected auto, 0 or 1, got {chosen!r}")
    return chosen


def leave_out(what: str, reason: str) -> None:
    """Say what the build leaves out, and why; fail where CUDA must be built."""
    if choice() == "1":
        raise SystemExit(f"fastcnn: FASTCNN_BUILD_CUDA=1, but {reason}")
    say(f"{what} left out: {reason}")


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


def ask(toolkit: Path, *options: str) -> str:
    """Return what nvcc answers."""
    return subprocess.run([toolkit / "bin/nvcc", *options], capture_output=True, text=True, check=True).stdout


def toolkit_version(toolkit: Path) -> tuple[int, int]:
    """Return nvcc's (major, minor)."""
    major, minor = re.search(r"release (\d+)\.(\d+)", ask(toolkit, "--version")).groups()
    return int(major), int(minor)


def no_toolkit(toolkit: Path | None) -> str:
    """Say what is wrong with the toolkit, and what to install, or return an empty string."""
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} has no CUDA: install a CUDA build of torch"
    wanted = torch.version.cuda.split(".")[0]
    if toolkit is None:
        return f"no nvcc: install the CUDA {wanted} toolkit, or set CUDA_HOME to where its include/cuda_runtime.h is"
    version = toolkit_version(toolkit)
    if version < OLDEST_CUDA:
        return f"nvcc {version[0]}.{version[1]} is too old: install CUDA {OLDEST_CUDA[0]}.{OLDEST_CUDA[1]} or later"
    if version[0] != int(wanted):
        return (
            f"nvcc is of CUDA {version[0]}, torch of CUDA {wanted}: install the CUDA {wanted} toolkit, or set CUDA_HOME"
        )
    return ""


def can_build(architecture: str, toolkit: Path) -> bool:
    """Tell whether the kernels can be built for 9.0, 9.0+PTX, 9.0a or the like."""
    found = re.fullmatch(r"(\d+)\.(\d)[af]?(\+PTX)?", architecture)
    return (
        found is not None
        and (int(found[1]), int(found[2])) >= OLDEST_GPU
        and f"compute_{found[1]}{found[2]}" in ask(toolkit, "--list-gpu-arch").split()
    )


def own_architectures() -> set[str]:
    """Return those of this machine's GPUs."""
    import torch

    capabilities = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
    return {f"{major}.{minor}" for major, minor in capabilities}


def choose_architectures(toolkit: Path) -> list[str]:
    """Return the GPUs to build for: of TORCH_CUDA_ARCH_LIST what can be built, else this machine's, else all."""
    listed = re.split("[;, ]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace("native", ""))
    asked = [each for entry in listed if entry for each in FAMILIES.get(entry.removesuffix("+PTX"), entry).split(";")]
    left = [each for each in asked if not can_build(each, toolkit)]
    if left:
        say(
            f"{', '.join(left)} of TORCH_CUDA_ARCH_LIST left out: expected GPUs from 8.0 up that nvcc knows, as 9.0+PTX"
        )
    if asked:
        return [each for each in dict.fromkeys(asked) if each not in left]
    return [each for each in sorted(own_architectures()) if can_build(each, toolkit)] or list(ARCHITECTURES)


def gencode(architecture: str) -> list[str]:
    """Return nvcc's flags that build for an architecture."""
    number = architecture.removesuffix("+PTX").replace(".", "")
    images = [f"sm_{number}", f"compute_{number}"][: 2 if architecture.endswith("+PTX") else 1]
    return [f"-gencode=arch=compute_{number},code={image}" for image in images]


def refused(toolkit: Path, architectures: list[str]) -> str:
    """Say why nvcc cannot compile an empty kernel, as with too new a host compiler, or return an empty string."""
    if not architectures:
        return "TORCH_CUDA_ARCH_LIST holds no GPU that they can be built for: set it to 8.0 or above, or unset it"
    flags = [flag for each in architectures for flag in gencode(each)]
    host = ["-ccbin", os.environ["CC"]] if os.environ.get("CC") else []  # as torch's build does
    with TemporaryDirectory() as folder:
        source = Path(folder) / "empty.cu"
        source.write_text("__global__ void empty() {}\n")
        command = [toolkit / "bin/nvcc", *CUDA_FLAGS, *flags, *host, "-c", source, "-o", f"{source}.o"]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return ""
    lines = [line.strip() for line in (done.stderr + done.stdout).splitlines() if re.search("error|fatal", line)]
    return (
        f"nvcc cannot compile ({lines[0] if lines else 'it does not say why'}): set CC and CXX to a compiler it takes"
    )


class CUDA(NamedTuple):
    """With which toolkit, and for which GPUs."""

    toolkit: Path
    architectures: list[str]


def choose_cuda() -> CUDA | None:
    """Return what to build CUDA with, or None to build without, as FASTCNN_BUILD_CUDA says."""
    if choice() == "0":
        return None
    toolkit, architectures = find_toolkit(), []
    reason = no_toolkit(toolkit)
    if toolkit and not reason:
        architectures = choose_architectures(toolkit)
        reason = refused(toolkit, architectures)
    if reason:
        leave_out("the CUDA kernels are", reason)
    return CUDA(toolkit, architectures) if toolkit and not reason else None


def kernels(cuda: CUDA | None) -> Extension:
    """Return the extension fastcnn._C."""
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    define = [
        ("FASTCNN_TORCH", f"{TORCH[0]}.{TORCH[1]}"),
        ("TORCH_TARGET_VERSION", f"0x{TORCH[0]:02x}{TORCH[1]:02x}000000000000ULL"),
        ("TORCH_STABLE_ONLY", None),
    ]
    sources = ["csrc/module.cpp", "csrc/ops.cpp", *glob("csrc/cpu/*.cpp")]
    flags = {"cxx": FLAGS + CPU_FLAGS}
    if cuda:
        version = ".".join(map(str, toolkit_version(cuda.toolkit)))
        define += [("USE_CUDA", None), ("FASTCNN_CUDA", version)]
        define += [("FASTCNN_ARCHITECTURES", ":".join(cuda.architectures))]  # nvcc splits at commas
        sources += glob("csrc/cuda/*.cu")
        flags["nvcc"] = CUDA_FLAGS + [flag for each in cuda.architectures for flag in gencode(each)]
    return (CUDAExtension if cuda else CppExtension)(
        "fastcnn._C",
        sorted(sources),
        depends=glob("csrc/**/*.*h", recursive=True),
        define_macros=define,
        extra_compile_args=flags,
        py_limited_api=True,
    )


def front() -> Extension:
    """Return the extension fastcnn._front."""
    from torch.utils.cpp_extension import CppExtension

    return CppExtension(
        "fastcnn._front",
        ["csrc/front/module.cpp"],
        depends=glob("csrc/front/*.h"),
        extra_compile_args={"cxx": ["-O2", *FLAGS[1:]]},
        optional=True,
    )


def build_command(cuda: CUDA | None) -> type:
    """Return torch's build command, which also says how many files it compiles, and where it is."""
    from torch.utils.cpp_extension import BuildExtension

    class Build(BuildExtension):
        def build_extension(self, extension: Extension) -> None:
            gpus = f", CUDA for {', '.join(cuda.architectures)}" if cuda and len(extension.sources) > 1 else ""
            say(f"{extension.name}: {len(extension.sources)} files to compile{gpus}")
            os.environ.setdefault("NINJA_STATUS", "fastcnn: file %s of %t, after %e s: ")
            try:
                super().build_extension(extension)
            except RuntimeError as error:
                if not extension.optional:
                    raise
                say(f"{extension.name} is left out: {error}")  # Python runs the calls, with CUDA or without

    return Build


def extensions() -> dict[str, object]:
    """Return setup's arguments that build the extensions."""
    if reason := missing():
        leave_out("the compiled kernels (fastcnn._C) are", reason)
        return {}
    cuda = choose_cuda()
    if cuda:
        os.environ["CUDA_HOME"] = str(cuda.toolkit)  # torch looks for it when its build is imported
    return {
        "ext_modules": [kernels(cuda), front()],
        "cmdclass": {"build_ext": build_command(cuda)},
        "options": {"bdist_wheel": {"py_limited_api": "cp311"}},
    }


setup(**extensions())
