"""Compile csrc/cuda with g++ against host_cuda.h: the operators of backend `cuda`, played on the CPU.

    python tests/host_cuda/build.py [--sanitize]

prints the library's path; FASTCNN_HOST_CUDA=<path> makes fastcnn load it. A sanitized library can only be loaded where
the sanitizers' runtimes are loaded first (tests/host_cuda/run.sh).
"""

import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
TORCH = Path(torch.__file__).parent
FLAGS = [
    "-std=c++20", "-O1", "-g1", "-fPIC", "-fno-math-errno", "-fvisibility=hidden",
    "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas",
    "-DFASTCNN_HOST_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000ULL", "-DTORCH_STABLE_ONLY",
    f"-I{HERE}", f"-isystem{TORCH / 'include'}",
]  # fmt: skip
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]


def build(sanitize: bool) -> Path:
    """Compile what has changed and link it; return the library."""
    folder = ROOT / "build" / ("host_cuda_sanitized" if sanitize else "host_cuda")
    folder.mkdir(parents=True, exist_ok=True)
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    flags = FLAGS + (SANITIZERS if sanitize else [])
    headers = [Path(__file__), *HERE.glob("*.h"), *ROOT.glob("csrc/*.h"), *ROOT.glob("csrc/[cm]*/*.*h")]
    sources = [ROOT / "csrc" / "ops.cpp", *sorted(ROOT.glob("csrc/cuda/*.cu"))]

    def compile(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        newest = max(file.stat().st_mtime for file in [source, *headers])
        if not target.exists() or target.stat().st_mtime <= newest:
            run([*compiler, *flags, "-x", "c++", "-c", str(source), "-o", str(target)])
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile, sources))
    library = folder / "libfastcnn_host_cuda.so"
    if not library.exists() or any(o.stat().st_mtime >= library.stat().st_mtime for o in objects):
        link = ["-shared", f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{TORCH / 'lib'}"]
        run([*compiler, *(SANITIZERS if sanitize else []), *map(str, objects), *link, "-o", str(library)])
    return library


def run(command: list[str]) -> None:
    """Run a compiler; its messages are the report."""
    if subprocess.run(command).returncode:
        raise SystemExit(f"failed: {shlex.join(command)}")


if __name__ == "__main__":
    print(build("--sanitize" in sys.argv[1:]))
