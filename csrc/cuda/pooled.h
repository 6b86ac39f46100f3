#pragma once
// What max-pool's backward knows of N windows at once: gradients, and the codes of their winners. Two 16-bit gradients
// share a register and an instruction, as do their codes.

#include "../math/window.h"
#include "pairs.h"

namespace fastcnn::cuda {

template <class T, int N>
class Pooled {
 public:
  Pooled() = default;

  // exists: else the codes name no place.
  __device__ __forceinline__ Pooled(const T* grad, const uint8_t* codes, bool exists = true) {
    const Floats<N> gradients = load<N>(grad);
    const Vector<uint8_t, N> places = load_packed<N>(codes);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      grad_[i] = gradients.at[i];
      code_[i] = exists ? places.at[i] : RELU_OFF;
    }
  }

  __device__ __forceinline__ Pooled(const Vector<T, N>& grad, uint32_t first_code, uint32_t second_code)
      : grad_{static_cast<float>(grad.at[0]), static_cast<float>(grad.at[1])},
        code_{static_cast<int32_t>(first_code), static_cast<int32_t>(second_code)} {
    static_assert(N == 2);
  }

  // The gradients whose winner is at `code`; zeros for the others.
  __device__ __forceinline__ Floats<N> won(int32_t code) const {
    Floats<N> gradients;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      gradients.at[i] = code_[i] == code ? grad_[i] : 0.0f;
    }
    return gradients;
  }

  __device__ __forceinline__ void add_won(int32_t code, Floats<N>& total) const {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (code_[i] == code) {
        total.at[i] += grad_[i];
      }
    }
  }

  // Add the gradients that flow at all.
  __device__ __forceinline__ void add_flowing(Floats<N>& total) const {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      total.at[i] += code_[i] == RELU_OFF ? 0.0f : grad_[i];
    }
  }

 private:
  float grad_[N];
  int32_t code_[N];
};

template <class T, int N>
constexpr bool IN_PAIRS = sizeof(T) == 2 && N % 2 == 0;

template <class T, int N>
  requires IN_PAIRS<T, N>
class Pooled<T, N> {
 public:
  Pooled() = default;

  __device__ __forceinline__ Pooled(const T* grad, const uint8_t* codes, bool exists = true) {
    const auto pairs = load_packed<N / 2>(reinterpret_cast<const uint32_t*>(grad));
    const auto places = load_packed<N / 2>(reinterpret_cast<const uint16_t*>(codes));
    const uint32_t none = exists ? 0 : 0xffffffffu;  // each byte is RELU_OFF
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      grad_[i] = pairs.at[i];
    }
    uint32_t bytes[(N + 3) / 4] = {};
    memcpy(bytes, places.at, sizeof(places));
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      code_[i] = numbers_of(bytes[i / 2] | none, i % 2 != 0);
    }
  }

  __device__ __forceinline__ Pooled(const Vector<T, N>& grad, uint32_t first_code, uint32_t second_code) {
    static_assert(N == 2);
    memcpy(grad_, grad.at, sizeof(grad_));
    code_[0] = two_numbers(first_code, second_code);
  }

  // The gradients whose winner is at `code`; zeros for the others.
  __device__ __forceinline__ Vector<T, N> won(int32_t code) const {
    uint32_t pairs[N / 2];
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      pairs[i] = grad_[i] & numbers_that_equal(code_[i], twice(code) | NUMBERS);
    }
    Vector<T, N> elements;
    memcpy(elements.at, pairs, sizeof(pairs));
    return elements;
  }

  __device__ __forceinline__ void add_won(int32_t code, Floats<N>& total) const { add(unpack(won(code)), total); }

  __device__ __forceinline__ void add_flowing(Floats<N>& total) const {
    uint32_t pairs[N / 2];
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      pairs[i] = grad_[i] & ~numbers_that_equal(code_[i], twice(RELU_OFF) | NUMBERS);
    }
    Vector<T, N> elements;
    memcpy(elements.at, pairs, sizeof(pairs));
    add(unpack(elements), total);
  }

 private:
  __device__ __forceinline__ static void add(const Floats<N>& values, Floats<N>& total) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      total.at[i] += values.at[i];
    }
  }

  uint32_t grad_[N / 2];
  uint32_t code_[N / 2];  // 16 bits each
};

// What a pixel of a patch of 2x2 gets. Windows of SIDE x SIDE lie two pixels apart; window [a][b] lies a windows before
// the patch's own by rows, b by columns. 16-bit gradients are added by pairs, then these; a pixel seldom wins three.
template <int SIDE, int PIXEL, class T, int N>
__device__ __forceinline__ Vector<T, N> gather(const Pooled<T, N> (&windows)[SIDE - 1][SIDE - 1]) {
  constexpr int ROW = PIXEL / 2, COLUMN = PIXEL % 2;
  constexpr int DOWN = SIDE == 3 && ROW == 0 ? 2 : 1, ACROSS = SIDE == 3 && COLUMN == 0 ? 2 : 1;
  const auto won = [&](int a, int b) { return windows[a][b].won((ROW + 2 * a) * SIDE + COLUMN + 2 * b); };
  if constexpr (IN_PAIRS<T, N>) {
    const auto of_row = [&](int a) {
      if constexpr (ACROSS == 2) {
        return add(won(a, 0), won(a, 1));
      } else {
        return won(a, 0);
      }
    };
    if constexpr (DOWN == 2) {
      return add(of_row(0), of_row(1));
    } else {
      return of_row(0);
    }
  } else {
    Floats<N> total = won(0, 0);
#pragma unroll
    for (int i = 1; i < DOWN * ACROSS; ++i) {
      const int a = i / ACROSS, b = i % ACROSS;
      windows[a][b].add_won((ROW + 2 * a) * SIDE + COLUMN + 2 * b, total);
    }
    return pack<T>(total);
  }
}

// How many patches of two pixels an axis has, the first one shifted into the padding.
template <class Int>
FASTCNN_HOST_DEVICE Int patches(const AxisOf<Int>& axis, Same<Int> length) {
  return ceil_div(length + axis.padding, 2);
}

// The side of a window that patches serve, or 0.
inline int64_t side_of_patches(const Window& window) {
  const auto fits = [](const Axis& axis, int64_t side) {
    return axis.size == side && axis.stride == 2 && axis.dilation == 1;
  };
  for (int64_t side : {2, 3}) {
    if (fits(window.rows, side) && fits(window.columns, side)) {
      return side;
    }
  }
  return 0;
}

}  // namespace fastcnn::cuda
