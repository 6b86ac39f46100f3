"""Build fastcnn._C, the compiled kernels, where torch and a C++ compiler are there; without them fastcnn installs too.

One build serves Python >= 3.11 (limited API) and torch >= 2.11 (ABI-stable LibTorch).
"""

import os
import shlex
import shutil
import sys
from glob import glob

from setuptools import setup

TORCH = (2, 11)
FLAGS = ["-O3", "-g0", "-std=c++20", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]
WARNINGS = ["-Wall", "-Wextra", "-Wno-unused-parameter"]  # torch's headers have unused parameters


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


def extension() -> dict[str, object]:
    """Return setup's arguments that build the extension."""
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    define = [
        ("FASTCNN_TORCH", f"{TORCH[0]}.{TORCH[1]}"),
        ("TORCH_TARGET_VERSION", f"0x{TORCH[0]:02x}{TORCH[1]:02x}000000000000ULL"),
        ("TORCH_STABLE_ONLY", None),
    ]
    sources = sorted(["csrc/module.cpp", "csrc/ops.cpp", *glob("csrc/cpu/*.cpp")])
    module = CppExtension(
        "fastcnn._C",
        sources,
        depends=glob("csrc/**/*.h", recursive=True),
        define_macros=define,
        extra_compile_args=FLAGS + WARNINGS,
        py_limited_api=True,
    )
    return {
        "ext_modules": [module],
        "cmdclass": {"build_ext": BuildExtension},
        "options": {"bdist_wheel": {"py_limited_api": "cp311"}},
    }


if reason := missing():
    print(f"fastcnn: the compiled kernels (fastcnn._C) are left out: {reason}", file=sys.stderr)
setup(**({} if reason else extension()))
