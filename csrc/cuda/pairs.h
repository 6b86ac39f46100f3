#pragma once
// Two 16-bit elements that share a register and an instruction, and vectors made of such pairs.

#include <cstring>

#include "../math/select.h"
#include "vector.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace fastcnn::cuda {

#ifdef __CUDACC__

template <class T>
using Native = std::conditional_t<std::is_same_v<T, BFloat16>, __nv_bfloat162, __half2>;

template <class T>
__device__ __forceinline__ Native<T> native(uint32_t pair) {
  return *reinterpret_cast<const Native<T>*>(&pair);
}

// The larger, or NaN if either is.
__device__ __forceinline__ float largest(float a, float b) {
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}

template <class T>
__device__ __forceinline__ uint32_t largest_pairs(uint32_t a, uint32_t b) {
  const Native<T> result = __hmax2_nan(native<T>(a), native<T>(b));
  return *reinterpret_cast<const uint32_t*>(&result);
}

// All bits of an element where both are equal, neither NaN.
template <class T>
__device__ __forceinline__ uint32_t pairs_that_equal(uint32_t a, uint32_t b) {
  return __heq2_mask(native<T>(a), native<T>(b));
}

template <class T>
__device__ __forceinline__ uint32_t pairs_that_are_nan(uint32_t value) {
  return __hneu2_mask(native<T>(value), native<T>(value));
}

// a + b of two elements, rounded to their type.
template <class T>
__device__ __forceinline__ uint32_t add_pairs(uint32_t a, uint32_t b) {
  const Native<T> sum = __hadd2(native<T>(a), native<T>(b));
  return *reinterpret_cast<const uint32_t*>(&sum);
}

// All bits of an element where wins(value, best), or where relu_off(value).
template <class T>
__device__ __forceinline__ uint32_t pairs_that_win(uint32_t value, uint32_t best) {
  return __hgt2_mask(native<T>(value), native<T>(best)) | __hneu2_mask(native<T>(value), native<T>(value));
}

template <class T>
__device__ __forceinline__ uint32_t pairs_that_are_off(uint32_t value) {
  return __hle2_mask(native<T>(value), native<T>(0));
}

#else

template <class T>
float element_of(uint32_t pair, int which) {
  return static_cast<float>(T(static_cast<uint16_t>(pair >> (16 * which)), T::from_bits()));
}

inline float largest(float a, float b) { return wins(a, b) ? a : b; }

inline uint32_t mask_of(bool low, bool high) { return (low ? 0xffffu : 0u) | (high ? 0xffff0000u : 0u); }

template <class T>
uint32_t largest_pairs(uint32_t a, uint32_t b) {
  const T low(largest(element_of<T>(a, 0), element_of<T>(b, 0))),
      high(largest(element_of<T>(a, 1), element_of<T>(b, 1)));
  return low.x | static_cast<uint32_t>(high.x) << 16;
}

template <class T>
uint32_t pairs_that_equal(uint32_t a, uint32_t b) {
  return mask_of(element_of<T>(a, 0) == element_of<T>(b, 0), element_of<T>(a, 1) == element_of<T>(b, 1));
}

template <class T>
uint32_t pairs_that_are_nan(uint32_t value) {
  return mask_of(
      element_of<T>(value, 0) != element_of<T>(value, 0), element_of<T>(value, 1) != element_of<T>(value, 1));
}

template <class T>
uint32_t add_pairs(uint32_t a, uint32_t b) {
  const T low(element_of<T>(a, 0) + element_of<T>(b, 0)), high(element_of<T>(a, 1) + element_of<T>(b, 1));
  return low.x | static_cast<uint32_t>(high.x) << 16;
}

template <class T>
uint32_t pairs_that_win(uint32_t value, uint32_t best) {
  return mask_of(
      wins(element_of<T>(value, 0), element_of<T>(best, 0)), wins(element_of<T>(value, 1), element_of<T>(best, 1)));
}

template <class T>
uint32_t pairs_that_are_off(uint32_t value) {
  return mask_of(relu_off(element_of<T>(value, 0)), relu_off(element_of<T>(value, 1)));
}

#endif

__device__ __forceinline__ uint32_t twice(uint32_t low) { return low | low << 16; }

// Two small numbers that are compared at once: as halves, all of them normal.
constexpr uint32_t NUMBERS = 0x3c003c00u;

__device__ __forceinline__ uint32_t two_numbers(uint32_t low, uint32_t high) { return (low | high << 16) | NUMBERS; }

// Of the four bytes of a word: the first two, or the others.
__device__ __forceinline__ uint32_t numbers_of(uint32_t bytes, bool others) {
#ifdef __CUDA_ARCH__
  return __byte_perm(bytes, NUMBERS >> 8, others ? 0x4342 : 0x4140);
#else
  return two_numbers(bytes >> (others ? 16 : 0) & 0xffu, bytes >> (others ? 24 : 8) & 0xffu);
#endif
}

// All bits of those that are equal.
__device__ __forceinline__ uint32_t numbers_that_equal(uint32_t a, uint32_t b) { return pairs_that_equal<Half>(a, b); }

// Two vectors added, rounded as stock layers round: values that become equal there must be equal here.
template <class T, int N>
__device__ __forceinline__ Vector<T, N> add(const Vector<T, N>& a, const Vector<T, N>& b) {
  Vector<T, N> sum;
  if constexpr (sizeof(T) == 2 && N % 2 == 0) {
    uint32_t left[N / 2], right[N / 2];
    memcpy(left, a.at, sizeof(left));
    memcpy(right, b.at, sizeof(right));
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      left[i] = add_pairs<T>(left[i], right[i]);
    }
    memcpy(sum.at, left, sizeof(left));
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      sum.at[i] = static_cast<T>(static_cast<float>(a.at[i]) + static_cast<float>(b.at[i]));
    }
  }
  return sum;
}

// The gradients whose output ReLU passed; zeros for the others.
template <class T, int N>
__device__ __forceinline__ Vector<T, N> masked(const Vector<T, N>& grad, const Vector<T, N>& output) {
  Vector<T, N> passed;
  if constexpr (sizeof(T) == 2 && N % 2 == 0) {
    uint32_t gradients[N / 2], outputs[N / 2];
    memcpy(gradients, grad.at, sizeof(gradients));
    memcpy(outputs, output.at, sizeof(outputs));
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      gradients[i] &= ~pairs_that_are_off<T>(outputs[i]);
    }
    memcpy(passed.at, gradients, sizeof(gradients));
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      passed.at[i] = relu_off(static_cast<float>(output.at[i])) ? static_cast<T>(0.0f) : grad.at[i];
    }
  }
  return passed;
}

}  // namespace fastcnn::cuda
