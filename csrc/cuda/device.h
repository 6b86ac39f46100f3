#pragma once
// What a kernel asks of the GPU beyond C++: shared memory, asynchronous copies, matrix instructions. tests/host_cuda
// plays the same functions on the CPU, so that g++ compiles and runs the very kernels that nvcc compiles.
//
// Kernels take all their shared memory through shared_memory(), none as __shared__ variables: the tests poison it.

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>

#ifdef __CUDACC__
#include <cuda_runtime.h>
#else
#include "host_cuda.h"
#endif

namespace fastcnn::cuda {

using BFloat16 = torch::headeronly::BFloat16;
using Half = torch::headeronly::Half;

constexpr int WARP = 32;
constexpr unsigned ALL_LANES = 0xffffffffu;

#ifdef __CUDACC__

// The block's dynamic shared memory, 16-byte aligned and undefined at the start.
__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char memory[];
  return memory;
}

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Copy BYTES (16, 8 or 4, aligned to as many) from global to shared memory in the background. If not valid, `from` is
// not read and zeros are written. 16 bytes pass by the first-level cache unless the block will read them AGAIN.
template <int BYTES, bool AGAIN = false>
__device__ __forceinline__ void copy_async(void* to, const void* from, bool valid) {
  static_assert(BYTES == 16 || BYTES == 8 || BYTES == 4);
  const int source_bytes = valid ? BYTES : 0;
  if constexpr (BYTES == 16 && !AGAIN) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(source_bytes)
        : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(to)), "l"(from), "n"(BYTES),
        "r"(source_bytes)
        : "memory");
  }
}

// Close the group of this thread's copies since the last one.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Wait until all but the newest PENDING groups of this thread have arrived; the block still needs a barrier.
template <int PENDING>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Load four 8x8 matrices of 16-bit elements (or 8x4 of 32-bit ones). Lane l points to row l % 8 of matrix l / 8, 16
// bytes, aligned; it gets from each matrix the 4 bytes at row l / 4, byte l % 4 * 4.
__device__ __forceinline__ void load_matrices(uint32_t (&values)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
      : "=r"(values[0]), "=r"(values[1]), "=r"(values[2]), "=r"(values[3])
      : "r"(shared_address(row))
      : "memory");
}

// The same for 16-bit elements, each matrix transposed: rows l % 4 * 2 and the next, column l / 4.
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&values)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
      : "=r"(values[0]), "=r"(values[1]), "=r"(values[2]), "=r"(values[3])
      : "r"(shared_address(row))
      : "memory");
}

// float32 rounded to the nearest TF32, ties away from zero, as bits.
__device__ __forceinline__ uint32_t to_tf32(float value) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return bits;
}

// The multiprocessors of the current device, for launchers that choose how finely to cut their work.
inline int multiprocessors() {
  int device = 0, count = 0;
  const bool known = cudaGetDevice(&device) == cudaSuccess &&
                     cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) == cudaSuccess;
  if (!known) {
    static_cast<void>(cudaGetLastError());  // else the runtime keeps it for the next call that asks
  }
  return known ? count : 1;
}

// c += a * b by a warp. Half and BFloat16: m16n8k16, two elements a register; float: m16n8k8 of TF32.
template <class T>
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

#define FASTCNN_MMA(T, INSTRUCTION)                                                                       \
  template <>                                                                                             \
  __device__ __forceinline__ void mma<T>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { \
    asm volatile(INSTRUCTION " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"                     \
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                                  \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                              \
  }
FASTCNN_MMA(BFloat16, "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32")
FASTCNN_MMA(Half, "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32")
FASTCNN_MMA(float, "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32")
#undef FASTCNN_MMA

#else

using host_cuda::commit_copies;
using host_cuda::copy_async;
using host_cuda::load_matrices;
using host_cuda::load_matrices_transposed;
using host_cuda::mma;
using host_cuda::multiprocessors;
using host_cuda::shared_memory;
using host_cuda::to_tf32;
using host_cuda::wait_for_copies;

#endif

}  // namespace fastcnn::cuda
