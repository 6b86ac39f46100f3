#pragma once
// Several neighbouring elements in one access of up to 16 bytes.

#include <cstdint>

#include "../math/host_device.h"
#include "device.h"

namespace fastcnn::cuda {

template <class T, int N>
struct alignas(sizeof(T) * N) Vector {
  T at[N];
};

// The elements that make 16 bytes.
template <class T>
constexpr int WIDTH = 16 / sizeof(T);

// N elements of a tensor in float32, the type of all arithmetic.
template <int N>
struct Floats {
  float at[N];
};

template <int N>
__device__ __forceinline__ Floats<N> broadcast(float value) {
  Floats<N> values;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    values.at[i] = value;
  }
  return values;
}

// pointer + times * step of so many bytes, into global memory, in one instruction: compilers make chains of
// neighbouring ones, of two or more each.
template <class T>
__device__ __forceinline__ T* advanced(T* pointer, uint32_t step, uint32_t times) {
#ifdef __CUDA_ARCH__
  size_t address;
  asm("mad.wide.u32 %0, %1, %2, %3;" : "=l"(address) : "r"(step), "r"(times), "l"(__cvta_generic_to_global(pointer)));
  return static_cast<T*>(__cvta_global_to_generic(address));
#else
  return reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(pointer) + static_cast<uint64_t>(step) * times);
#endif
}

template <int N, class T>
__device__ __forceinline__ Vector<T, N> load_packed(const T* from) {
  return *reinterpret_cast<const Vector<T, N>*>(from);
}

template <int N, class T>
__device__ __forceinline__ void store_packed(T* to, const Vector<T, N>& packed) {
  *reinterpret_cast<Vector<T, N>*>(to) = packed;
}

// One after another, where nothing is known of the address.
template <int N, class T>
__device__ __forceinline__ void store_apart(T* to, const Vector<T, N>& packed) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    to[i] = packed.at[i];
  }
}

template <class T, int N>
__device__ __forceinline__ Floats<N> unpack(const Vector<T, N>& packed) {
  Floats<N> values;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    values.at[i] = static_cast<float>(packed.at[i]);
  }
  return values;
}

template <int N, class T>
__device__ __forceinline__ Floats<N> load(const T* from) {
  return unpack(load_packed<N>(from));
}

template <class T, int N>
__device__ __forceinline__ Vector<T, N> pack(const Floats<N>& values) {
  Vector<T, N> packed;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    packed.at[i] = static_cast<T>(values.at[i]);
  }
  return packed;
}

template <int N, class T>
__device__ __forceinline__ void store(T* to, const Floats<N>& values) {
  store_packed(to, pack<T>(values));
}

FASTCNN_HOST_DEVICE bool is_aligned(const void* pointer, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

}  // namespace fastcnn::cuda
