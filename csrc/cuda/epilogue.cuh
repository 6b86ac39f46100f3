#pragma once
// What follows the product in the same kernel: bias, ReLU, a 2x2 max-pool, and stores in the output's layout. The
// accumulators go through shared memory, rounded, so that neighbouring threads store neighbouring elements.

#include "../math/select.h"
#include "implicit_gemm.cuh"

namespace fastcnn::cuda {

// The part of a tile that is in shared memory at a time: the rows of one row of warps.
template <class T, class TILE>
struct Staged {
  static constexpr int ROWS = TILE::WARP_M;
  static constexpr int PITCH = TILE::N + 8;  // eight rows, of which each lane writes two elements, in different banks
  static_assert(ROWS * PITCH * static_cast<int>(sizeof(T)) <= TILE::SHARED_BYTES);
};

// Add the bias, apply ReLU, round, and put a warp's accumulators in rows from the first on.
template <class T, class TILE>
__device__ __forceinline__ void stage(
    const Gemm<T>& gemm, const Corner<T>& corner, const Accumulators<T, TILE>& product, T* rows) {
  using Product = Accumulators<T, TILE>;
  const int lane = static_cast<int>(threadIdx.x) % WARP;
#pragma unroll
  for (int j = 0; j < Product::TILES_N; ++j) {
    const int column = product.column() + j * 8 + lane % 4 * 2;
    float bias[2] = {};
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const int channel = corner.channel + column + k;
      if (gemm.bias != nullptr && channel < gemm.group_out) {
        bias[k] = static_cast<float>(gemm.bias[corner.group * gemm.group_out + channel]);
      }
    }
#pragma unroll
    for (int i = 0; i < Product::TILES_M; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        T* to = rows + (i * 16 + half * 8 + lane / 4) * Staged<T, TILE>::PITCH + column;
        const float* from = product.values[i][j] + half * 2;
        store<2>(to, Floats<2>{relu(from[0] + bias[0]), relu(from[1] + bias[1])});
      }
    }
  }
}

// Replace a window's first row by the winners of its four; their codes.
template <class T, int N>
__device__ __forceinline__ Vector<uint8_t, N> pool_rows(const T* rows, int pitch, Vector<T, N>& winners) {
  Vector<uint8_t, N> codes = {};
#pragma unroll
  for (int place = 1; place < 4; ++place) {
    const auto later = *reinterpret_cast<const Vector<T, N>*>(rows + place * pitch);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (wins(static_cast<float>(later.at[i]), static_cast<float>(winners.at[i]))) {
        winners.at[i] = later.at[i];
        codes.at[i] = static_cast<uint8_t>(place);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (relu_off(static_cast<float>(winners.at[i]))) {
      codes.at[i] = static_cast<uint8_t>(RELU_OFF);
    }
  }
  return codes;
}

// Where a place's channel is in the output; both count from the corner.
template <class T>
__device__ __forceinline__ int64_t output_at(const Gemm<T>& gemm, const Corner<T>& corner, int place, int channel) {
  const int64_t channels = static_cast<int64_t>(gemm.groups) * gemm.group_out;
  const int64_t first = static_cast<int64_t>(corner.group) * gemm.group_out + corner.channel + channel;
  if (gemm.channels_last) {
    return (corner.place + place) * channels + first;
  }
  const int inside = corner.inside + place;
  return ((corner.image + inside / gemm.image_places) * channels + first) * gemm.image_places +
         inside % gemm.image_places;
}

// Store the staged rows, N channels of one place at a time, neighbouring threads along the output's fastest axis.
template <int N, class T, class TILE>
__device__ __forceinline__ void store_rows(
    const Gemm<T>& gemm, const Corner<T>& corner, const T* rows, int first_row, const TILE&) {
  constexpr int PITCH = Staged<T, TILE>::PITCH, VECTORS = TILE::N / N;
  const int each = gemm.pooled ? 4 : 1, places = Staged<T, TILE>::ROWS / each, first = first_row / each;
  for (int item = static_cast<int>(threadIdx.x); item < places * VECTORS; item += TILE::THREADS) {
    const int place = gemm.channels_last ? item / VECTORS : item % places;
    const int column = (gemm.channels_last ? item % VECTORS : item / places) * N;
    if (corner.place + first + place >= gemm.places || corner.channel + column >= gemm.group_out) {
      continue;
    }
    const T* from = rows + place * each * PITCH + column;
    const int64_t to = output_at(gemm, corner, first + place, column);
    auto values = *reinterpret_cast<const Vector<T, N>*>(from);
    if (gemm.pooled) {
      const Vector<uint8_t, N> codes = pool_rows<T, N>(from, PITCH, values);
      if (gemm.codes != nullptr) {
        *reinterpret_cast<Vector<uint8_t, N>*>(gemm.codes + to) = codes;
      }
    }
    *reinterpret_cast<Vector<T, N>*>(gemm.output + to) = values;
  }
}

// The whole epilogue, one row of warps at a time: the staged rows then fit in the operands' memory.
template <class T, class TILE>
__device__ __forceinline__ void finish(
    const Gemm<T>& gemm, const Corner<T>& corner, const Accumulators<T, TILE>& product) {
  T* rows = reinterpret_cast<T*>(shared_memory());
  for (int first_row = 0; first_row < TILE::M; first_row += TILE::WARP_M) {
    __syncthreads();
    if (product.row() == first_row) {
      stage(gemm, corner, product, rows);
    }
    __syncthreads();
    if (gemm.wide_stores) {
      store_rows<WIDTH<T>>(gemm, corner, rows, first_row, TILE());
    } else {
      store_rows<1>(gemm, corner, rows, first_row, TILE());
    }
  }
}

}  // namespace fastcnn::cuda
