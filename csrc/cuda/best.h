#pragma once
// The winners of N windows at once, one for each of a thread's channels. Two 16-bit elements share a register and an
// instruction.
//
// Few places, all of them loaded, are judged together: the largest value of all, then the first place that has it. That
// takes three instructions a place where comparing place after place takes four, and for two 16-bit elements at once.

#include <limits>

#include "../math/window.h"
#include "pairs.h"

namespace fastcnn::cuda {

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
  // no code is known. exist: of two elements, all bits of one whose place 0 is inside: outside it has the value of
  // place 1.
  template <int COUNT>
  __device__ __forceinline__ Best(const Vector<T, N> (&places)[COUNT], bool with_codes, uint32_t exist = 0xffffffffu) {
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
          const bool exists = place > 0 || (exist & 1u << (16 * i % 32)) != 0;
          code_[i] = exists & (values[place] == value_[i]) ? place : code_[i];
        }
      }
    }
  }

  // The winners of SIDE rows of SIDE places, each with its own winners.
  template <int SIDE>
  __device__ __forceinline__ Best(const Best (&rows)[SIDE], bool with_codes) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      value_[i] = rows[0].value_[i];
#pragma unroll
      for (int row = 1; row < SIDE; ++row) {
        value_[i] = largest(value_[i], rows[row].value_[i]);
      }
      code_[i] = 0;
      if (with_codes) {
        code_[i] = rows[SIDE - 1].code_[i] + (SIDE - 1) * SIDE;
#pragma unroll
        for (int row = SIDE - 2; row >= 0; --row) {
          code_[i] = rows[row].value_[i] == value_[i] ? rows[row].code_[i] + row * SIDE : code_[i];
        }
      }
    }
  }

  // Give the i-th element another code.
  __device__ __forceinline__ void set_code(int which, int32_t code) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      code_[i] = i == which ? code : code_[i];
    }
  }

  __device__ __forceinline__ void add_to_codes(int32_t number) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      code_[i] += number;
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

  __device__ __forceinline__ Vector<T, N> values() const {
    Vector<T, N> elements;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      elements.at[i] = static_cast<T>(value_[i]);
    }
    return elements;
  }

  __device__ __forceinline__ Vector<uint8_t, N> codes() const {
    Vector<uint8_t, N> places;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      places.at[i] = static_cast<uint8_t>(code_[i]);
    }
    return places;
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
  __device__ __forceinline__ Best(const Vector<T, N> (&places)[COUNT], bool with_codes, uint32_t exist = 0xffffffffu) {
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
          const uint32_t equal = pairs_that_equal<T>(values[place][i], value_[i]);
          const uint32_t first = place > 0 ? equal : equal & exist;
          code_[i] = (twice(static_cast<uint32_t>(place)) & first) | (code_[i] & ~first);
        }
      }
    }
  }

  template <int SIDE>
  __device__ __forceinline__ Best(const Best (&rows)[SIDE], bool with_codes) {
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      value_[i] = rows[0].value_[i];
#pragma unroll
      for (int row = 1; row < SIDE; ++row) {
        value_[i] = largest_pairs<T>(value_[i], rows[row].value_[i]);
      }
      code_[i] = 0;
      if (with_codes) {
        code_[i] = rows[SIDE - 1].code_[i] + twice((SIDE - 1) * SIDE);
#pragma unroll
        for (int row = SIDE - 2; row >= 0; --row) {
          const uint32_t first = pairs_that_equal<T>(rows[row].value_[i], value_[i]);
          code_[i] = ((rows[row].code_[i] + twice(row * SIDE)) & first) | (code_[i] & ~first);
        }
      }
    }
  }

  __device__ __forceinline__ void set_code(int which, uint32_t code) {
    const int shift = 16 * (which % 2);
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      code_[i] = i == which / 2 ? (code_[i] & ~(0xffffu << shift)) | code << shift : code_[i];
    }
  }

  __device__ __forceinline__ void add_to_codes(uint32_t number) {
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      code_[i] += twice(number);
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

  __device__ __forceinline__ Vector<T, N> values() const {
    Vector<T, N> elements;
    memcpy(elements.at, value_, sizeof(value_));
    return elements;
  }

  __device__ __forceinline__ Vector<uint8_t, N> codes() const {
    Vector<uint8_t, N> places;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      places.at[i] = static_cast<uint8_t>(code_[i / 2] >> (16 * (i % 2)));
    }
    return places;
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
