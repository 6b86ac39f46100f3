"""How a kernel is started (csrc/cuda/launch.h), against a CUDA runtime of our own that fails when it is told to."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
RUNTIME = r"""
#pragma once
#include <cstdint>
#define __global__
#define __device__
#define __host__
#define __shared__
#define __forceinline__ inline
#define __align__(n)
using cudaStream_t = void*;
struct dim3 { unsigned x; };
enum cudaError_t { cudaSuccess = 0, cudaErrorNoKernelImageForDevice = 209, cudaErrorInvalidValue = 1 };
enum { cudaFuncAttributeMaxDynamicSharedMemorySize, cudaDevAttrMultiProcessorCount };
inline cudaError_t answer = cudaSuccess, kept = cudaSuccess;  // what calls return, and what the runtime remembers
inline cudaError_t call() { return kept = answer == cudaSuccess ? kept : answer, answer; }
inline cudaError_t cudaGetLastError() { const auto error = kept; kept = cudaSuccess; return error; }
inline const char* cudaGetErrorString(cudaError_t) { return "the runtime's words"; }
inline cudaError_t cudaFuncSetAttribute(const void*, int, int) { return call(); }
inline cudaError_t cudaLaunchKernel(const void*, dim3, dim3, void**, int64_t, cudaStream_t) { return call(); }
inline cudaError_t cudaGetDevice(int*) { return call(); }
inline cudaError_t cudaDeviceGetAttribute(int*, int, int) { return call(); }
inline uint32_t __cvta_generic_to_shared(const void*) { return 0; }
"""
SOURCE = r"""
#include <torch/csrc/stable/accelerator.h>

#include "../tensors.h"  // torch's headers first: after the next line they would ask for more of CUDA

namespace torch::stable::accelerator {
struct NoGuard {
  explicit NoGuard(int) {}
};
}  // namespace torch::stable::accelerator
#define DeviceGuard NoGuard
#define __CUDACC__
#include "launch.h"

#include <string>

extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) { *stream = nullptr; return 0; }

namespace {
void kernel(int) {}
std::string said;

template <class Call>
const char* said_by(int error, const Call& run) {
  answer = static_cast<cudaError_t>(error);
  said.clear();
  try {
    run();
  } catch (const std::exception& exception) {
    said = exception.what();
  }
  answer = cudaSuccess;
  return said.c_str();
}
}  // namespace

extern "C" {
const char* launch(int error, int shared_bytes) {
  return said_by(error, [&] {
    fastcnn::cuda::Device(torch::stable::empty({1}, torch::headeronly::ScalarType::Float))
        .launch(kernel, 1, 32, shared_bytes, 7);
  });
}
const char* count(int error) { return said_by(error, [] { fastcnn::cuda::multiprocessors(); }); }
int left_behind() { return cudaGetLastError(); }
}
"""


@pytest.fixture(scope="module")
def launching(tmp_path_factory):
    """Compile launch.h with its CUDA branch, against the runtime above."""
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("launch")
    (folder / "cuda_runtime.h").write_text(RUNTIME)
    (folder / "launch.cpp").write_text(SOURCE)
    torch_folder = Path(torch.__file__).parent
    flags = [
        "-std=c++20",
        "-w",
        "-fpermissive",
        "-shared",
        "-fPIC",
        "-DUSE_CUDA",
        "-DTORCH_TARGET_VERSION=0x020b000000000000ULL",
    ]
    includes = [f"-I{folder}", f"-I{ROOT / 'csrc/cuda'}", f"-I{torch_folder / 'include'}"]
    libraries = [f"-L{torch_folder / 'lib'}", "-ltorch_cpu", f"-Wl,-rpath,{torch_folder / 'lib'}"]
    command = ["c++", *flags, *includes, "launch.cpp", *libraries, "-o", "launch.so"]
    subprocess.run(command, cwd=folder, check=True)
    library = ctypes.CDLL(str(folder / "launch.so"))
    library.launch.restype = library.count.restype = ctypes.c_char_p
    return library


def test_a_launch_that_succeeds_says_nothing(launching):
    assert launching.launch(0, 64 * 1024) == b""


@pytest.mark.parametrize("shared_bytes", [0, 64 * 1024], ids=["launch", "attribute"])
def test_a_failed_launch_raises_and_leaves_nothing_in_the_runtime(launching, shared_bytes):
    assert b"could not be started: the runtime's words" in launching.launch(1, shared_bytes)
    assert launching.left_behind() == 0


def test_a_gpu_without_a_kernel_image_is_told_where_to_look(launching):
    assert b"(fastcnn doctor tells for which GPUs they are)" in launching.launch(209, 0)


def test_asking_for_the_multiprocessors_leaves_nothing_in_the_runtime(launching):
    assert launching.count(1) == b""
    assert launching.left_behind() == 0
