#pragma once
// What a block of the direct convolution writes: a tile of finished values from shared memory, pooled or as they are.

#include "../math/window.h"
#include "direct_product.h"

namespace fastcnn::cuda {

template <class T>
struct Output {
  T* values;
  uint8_t* codes;  // or null
  int rows, columns;
  int channels;
  bool channels_last;
  bool vectors;  // 16 bytes at once are aligned

  // From the first value of an image.
  __device__ __forceinline__ int64_t place(int channel, int row, int column) const {
    const int pixel = row * columns + column;
    return channels_last ? int64_t{pixel} * channels + channel : int64_t{channel} * (rows * columns) + pixel;
  }
};

// Where a tile's first value goes, and how many channels it has.
struct Origin {
  int64_t image;
  int row, column;
  int channel, channels;
};

// The four values of N windows, [place][window]: the windows are neighbours in a row, or the same in neighbouring
// channels.
template <int N, class T, int CHANNELS>
__device__ __forceinline__ void load_windows(T (&values)[4][N], const Staged<T, CHANNELS>& staged, int window, int channel) {
  if (staged.channels_last) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const auto places = *reinterpret_cast<const Vector<T, N>*>(staged.place(window * 4 + i, channel));
#pragma unroll
      for (int j = 0; j < N; ++j) {
        values[i][j] = places.at[j];
      }
    }
  } else {
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const auto places = *reinterpret_cast<const Vector<T, 4>*>(staged.place((window + j) * 4, channel));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        values[i][j] = places.at[i];
      }
    }
  }
}

template <int N, class T, int CHANNELS>
__device__ __forceinline__ void write_windows(
    const Output<T>& output, int64_t place, const Staged<T, CHANNELS>& staged, int window, int channel) {
  T values[4][N];
  load_windows(values, staged, window, channel);
  Vector<T, N> best;
  Vector<uint8_t, N> codes;
#pragma unroll
  for (int j = 0; j < N; ++j) {
    float most = static_cast<float>(values[0][j]);
    int code = 0;
#pragma unroll
    for (int i = 1; i < 4; ++i) {
      const float value = static_cast<float>(values[i][j]);
      const bool better = wins(value, most);
      most = better ? value : most;
      code = better ? i : code;
    }
    best.at[j] = static_cast<T>(most);
    codes.at[j] = static_cast<uint8_t>(relu_off(most) ? RELU_OFF : code);
  }
  *reinterpret_cast<Vector<T, N>*>(output.values + place) = best;
  if (output.codes) {
    *reinterpret_cast<Vector<uint8_t, N>*>(output.codes + place) = codes;
  }
}

// Write the tile, N neighbouring values a thread at a time.
template <int N, bool POOL, class T, int CHANNELS>
__device__ __forceinline__ void write_tile(const Output<T>& output, const Staged<T, CHANNELS>& staged, const Origin& origin) {
  constexpr int COLUMNS = POOL ? TILE_COLUMNS / 2 : TILE_COLUMNS, PIXELS = POOL ? TILE_PIXELS / 4 : TILE_PIXELS;
  const int64_t image = origin.image * (output.rows * output.columns) * output.channels;
#pragma unroll 1
  for (int i = threadIdx.x; i < PIXELS * CHANNELS / N; i += THREADS) {
    const int pixel = output.channels_last ? i / (CHANNELS / N) : i % (PIXELS / N) * N;
    const int channel = output.channels_last ? i % (CHANNELS / N) * N : i / (PIXELS / N);
    const int row = origin.row + pixel / COLUMNS, column = origin.column + pixel % COLUMNS;
    if (channel < origin.channels && row < output.rows && column < output.columns) {
      const int64_t place = image + output.place(origin.channel + channel, row, column);
      if constexpr (POOL) {
        write_windows<N>(output, place, staged, pixel, channel);
      } else {
        *reinterpret_cast<Vector<T, N>*>(output.values + place) =
            *reinterpret_cast<const Vector<T, N>*>(staged.place(pixel, channel));
      }
    }
  }
}

}  // namespace fastcnn::cuda
