#pragma once
// The winners of N windows at once, one for each of a thread's channels. Two 16-bit elements share a register and an
// instruction.
//
// Few places, all of them loaded, are judged together: the largest value of all, then the first place that has it. That
// takes three instructions a place where comparing place after place takes four, and for two 16-bit elements at once.

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

  // The winners of COUNT places, in the order of their codes. with_codes: else there are only values. Where NaN wins,
  // no code is known.
  template <int COUNT>
  __device__ __forceinline__ Best(const Vector<T, N> (&places)[COUNT], bool with_codes) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      float values[COUNT];
#pragma unroll
      for (int place = 0; place < COUNT; ++place) {
        values[place] = static_cast<float>(places[place].at[i]);
      }
      value_[i] = values[0];
#pragma unroll
      for (int place = 1; place < COUNT; ++place) {
        value_[i] = largest(value_[i], values[place]);
      }
      code_[i] = COUNT - 1;
      if (with_codes) {
#pragma unroll
        for (int place = COUNT - 2; place >= 0; --place) {
          code_[i] = values[place] == value_[i] ? place : code_[i];
        }
      }
    }
  }

  // Compare one more place.
  __device__ __forceinline__ void take(const Vector<T, N>& elements, int32_t code) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const auto value = static_cast<float>(elements.at[i]);
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

  __device__ __forceinline__ bool has_nan() const {
    bool found = false;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      found |= value_[i] != value_[i];
    }
    return found;
  }

  __device__ __forceinline__ void store(T* y) const {
    Vector<T, N> elements;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      elements.at[i] = static_cast<T>(value_[i]);
    }
    store_packed(y, elements);
  }

  __device__ __forceinline__ void store_codes(uint8_t* codes) const {
    Vector<uint8_t, N> places;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      places.at[i] = static_cast<uint8_t>(code_[i]);
    }
    store_packed(codes, places);
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

  template <int COUNT>
  __device__ __forceinline__ Best(const Vector<T, N> (&places)[COUNT], bool with_codes) {
    uint32_t values[COUNT][N / 2];
    memcpy(values, places, sizeof(values));
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      value_[i] = values[0][i];
#pragma unroll
      for (int place = 1; place < COUNT; ++place) {
        value_[i] = largest_pairs<T>(value_[i], values[place][i]);
      }
      code_[i] = twice(COUNT - 1);
      if (with_codes) {
#pragma unroll
        for (int place = COUNT - 2; place >= 0; --place) {
          const uint32_t first = pairs_that_equal<T>(values[place][i], value_[i]);
          code_[i] = (twice(static_cast<uint32_t>(place)) & first) | (code_[i] & ~first);
        }
      }
    }
  }

  __device__ __forceinline__ void take(const Vector<T, N>& elements, int32_t code) {
    uint32_t values[N / 2];
    memcpy(values, elements.at, sizeof(values));
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      const uint32_t won = pairs_that_win<T>(values[i], value_[i]);
      value_[i] = (values[i] & won) | (value_[i] & ~won);
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

  __device__ __forceinline__ bool has_nan() const {
    uint32_t found = 0;
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      found |= pairs_that_are_nan<T>(value_[i]);
    }
    return found != 0;
  }

  __device__ __forceinline__ void store(T* y) const {
    Vector<T, N> elements;
    memcpy(elements.at, value_, sizeof(value_));
    store_packed(y, elements);
  }

  __device__ __forceinline__ void store_codes(uint8_t* codes) const {
    Vector<uint8_t, N> places;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      places.at[i] = static_cast<uint8_t>(code_[i / 2] >> (16 * (i % 2)));
    }
    store_packed(codes, places);
  }

 private:
  uint32_t value_[N / 2];
  uint32_t code_[N / 2];  // two codes, 16 bits each
};

// The winners of COUNT places, NaN or not.
template <class T, int N, int COUNT>
__device__ __forceinline__ Best<T, N> best_of(const Vector<T, N> (&places)[COUNT], bool codes) {
  Best<T, N> best(places, codes);
  if (codes && best.has_nan()) {
    best = Best<T, N>(0);
#pragma unroll
    for (int place = 0; place < COUNT; ++place) {
      best.take(places[place], place);
    }
  }
  return best;
}

}  // namespace fastcnn::cuda
