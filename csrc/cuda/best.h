#pragma once
// The winners of N windows at once, one for each of a thread's channels, while their places are compared in turn. Two
// 16-bit elements share a register and an instruction.

#include <cstring>
#include <limits>

#include "../math/select.h"
#include "../math/window.h"
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

template <class T>
uint32_t add_pairs(uint32_t a, uint32_t b) {
  const T low(element_of<T>(a, 0) + element_of<T>(b, 0)), high(element_of<T>(a, 1) + element_of<T>(b, 1));
  return low.x | static_cast<uint32_t>(high.x) << 16;
}

inline uint32_t mask_of(bool low, bool high) { return (low ? 0xffffu : 0u) | (high ? 0xffff0000u : 0u); }

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

// The elements and codes so far; first_code is that of the first place, which wins even if it is minus infinity.
template <class T, int N>
class Best {
 public:
  Best() = default;

  __device__ __forceinline__ explicit Best(int32_t first_code) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      value_[i] = -std::numeric_limits<float>::infinity();
      code_[i] = first_code;
    }
  }

  // STAGE: with the bias, and rounded as stock layers round: values that become equal there must be equal here.
  template <bool STAGE>
  __device__ __forceinline__ void take(const Vector<T, N>& elements, int32_t code, const Vector<T, N>& bias) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      float value = static_cast<float>(elements.at[i]);
      if constexpr (STAGE) {
        value = static_cast<float>(static_cast<T>(value + static_cast<float>(bias.at[i])));
      }
      const bool won = wins(value, value_[i]);
      value_[i] = won ? value : value_[i];
      code_[i] = won ? code : code_[i];
    }
  }

  __device__ __forceinline__ void apply_relu() {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      code_[i] = relu_off(value_[i]) ? RELU_OFF : code_[i];
      value_[i] = relu(value_[i]);
    }
  }

  __device__ __forceinline__ void store(T* y, uint8_t* codes) const {
    Vector<T, N> elements;
    Vector<uint8_t, N> places;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      elements.at[i] = static_cast<T>(value_[i]);
      places.at[i] = static_cast<uint8_t>(code_[i]);
    }
    store_packed(y, elements);
    if (codes != nullptr) {
      store_packed(codes, places);
    }
  }

 private:
  float value_[N];
  int32_t code_[N];
};

template <class T, int N>
  requires(sizeof(T) == 2 && N % 2 == 0)
class Best<T, N> {
 public:
  Best() = default;

  __device__ __forceinline__ explicit Best(int32_t first_code) {
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      value_[i] = twice(static_cast<T>(-std::numeric_limits<float>::infinity()).x);
      code_[i] = twice(static_cast<uint32_t>(first_code));
    }
  }

  template <bool STAGE>
  __device__ __forceinline__ void take(const Vector<T, N>& elements, int32_t code, const Vector<T, N>& bias) {
    uint32_t values[N / 2], biases[N / 2];
    memcpy(values, elements.at, sizeof(values));
    memcpy(biases, bias.at, sizeof(biases));
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      const uint32_t value = STAGE ? add_pairs<T>(values[i], biases[i]) : values[i];
      const uint32_t won = pairs_that_win<T>(value, value_[i]);
      value_[i] = (value & won) | (value_[i] & ~won);
      code_[i] = (twice(static_cast<uint32_t>(code)) & won) | (code_[i] & ~won);
    }
  }

  __device__ __forceinline__ void apply_relu() {
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      const uint32_t off = pairs_that_are_off<T>(value_[i]);
      value_[i] &= ~off;
      code_[i] |= off & twice(RELU_OFF);
    }
  }

  __device__ __forceinline__ void store(T* y, uint8_t* codes) const {
    Vector<T, N> elements;
    Vector<uint8_t, N> places;
    memcpy(elements.at, value_, sizeof(value_));
#pragma unroll
    for (int i = 0; i < N; ++i) {
      places.at[i] = static_cast<uint8_t>(code_[i / 2] >> (16 * (i % 2)));
    }
    store_packed(y, elements);
    if (codes != nullptr) {
      store_packed(codes, places);
    }
  }

 private:
  uint32_t value_[N / 2];
  uint32_t code_[N / 2];  // two codes, 16 bits each
};

}  // namespace fastcnn::cuda
