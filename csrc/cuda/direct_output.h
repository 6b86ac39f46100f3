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
  int64_t channels;
  bool channels_last;
  bool vectors;  // 16 bytes at once are aligned

  __device__ __forceinline__ int64_t place(int64_t image, int channel, int row, int column) const {
    return channels_last ? ((image * rows + row) * columns + column) * channels + channel
                         : ((image * channels + channel) * rows + row) * columns + column;
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
template <int N, class T>
__device__ __forceinline__ void load_windows(T (&values)[4][N], const Staged<T>& staged, int window, int channel) {
  if (staged.channel_step == 1) {
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

template <int N, class T>
__device__ __forceinline__ void write_windows(
    const Output<T>& output, int64_t place, const Staged<T>& staged, int window, int channel) {
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
template <int N, class T>
__device__ __forceinline__ void write_tile(
    const Output<T>& output, const Staged<T>& staged, const Origin& origin, bool pool) {
  const int columns = pool ? TILE_COLUMNS / 2 : TILE_COLUMNS, pixels = pool ? TILE_PIXELS / 4 : TILE_PIXELS;
  const int lines = output.channels_last ? pixels : origin.channels;
  const int units = (output.channels_last ? origin.channels : pixels) / N;  // of a line
  for (int i = threadIdx.x; i < lines * units; i += THREADS) {
    const int line = i / units, along = i % units * N;
    const int pixel = output.channels_last ? line : along, channel = output.channels_last ? along : line;
    const int row = origin.row + pixel / columns, column = origin.column + pixel % columns;
    if (row >= output.rows || column >= output.columns) {
      continue;
    }
    const int64_t place = output.place(origin.image, origin.channel + channel, row, column);
    if (pool) {
      write_windows<N>(output, place, staged, pixel, channel);
    } else {
      *reinterpret_cast<Vector<T, N>*>(output.values + place) =
          *reinterpret_cast<const Vector<T, N>*>(staged.place(pixel, channel));
    }
  }
}

}  // namespace fastcnn::cuda
