#pragma once
// What a block of the direct convolution writes: a tile of finished values from shared memory, pooled or as they are.

#include "best.h"
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

// The four values of N windows, a vector for each place: the windows are neighbours in a row, or the same in
// neighbouring channels.
template <int N, class T, int CHANNELS>
__device__ __forceinline__ void load_windows(
    Vector<T, N> (&places)[4], const Results<T, CHANNELS>& results, int window, int channel) {
  if (results.channels_last) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      places[i] = load_packed<N>(results.place(window * 4 + i, channel));
    }
  } else {
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const Vector<T, 4> values = load_packed<4>(results.place((window + j) * 4, channel));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        places[i].at[j] = values.at[i];
      }
    }
  }
}

template <int N, class T, int CHANNELS>
__device__ __forceinline__ void write_windows(
    const Output<T>& output, int64_t at, const Results<T, CHANNELS>& results, int window, int channel) {
  Vector<T, N> places[4];
  load_windows(places, results, window, channel);
  Best<T, N> best = best_of(places, output.codes != nullptr);
  best.apply_relu();  // the values have it already: for the codes
  store_packed(output.values + at, best.values());
  if (output.codes != nullptr) {
    store_packed(output.codes + at, best.codes());
  }
}

// Write the tile, N neighbouring values a thread at a time.
template <int N, bool POOL, class T, int CHANNELS>
__device__ __forceinline__ void write_tile(
    const Output<T>& output, const Results<T, CHANNELS>& results, const Origin& origin) {
  constexpr int COLUMNS = POOL ? TILE_COLUMNS / 2 : TILE_COLUMNS, PIXELS = POOL ? TILE_PIXELS / 4 : TILE_PIXELS;
  const int64_t image = origin.image * (output.rows * output.columns) * output.channels;
#pragma unroll 1
  for (int i = threadIdx.x; i < PIXELS * CHANNELS / N; i += THREADS) {
    const int pixel = output.channels_last ? i / (CHANNELS / N) : i % (PIXELS / N) * N;
    const int channel = output.channels_last ? i % (CHANNELS / N) * N : i / (PIXELS / N);
    const int row = origin.row + pixel / COLUMNS, column = origin.column + pixel % COLUMNS;
    if (channel < origin.channels && row < output.rows && column < output.columns) {
      const int64_t at = image + output.place(origin.channel + channel, row, column);
      if constexpr (POOL) {
        write_windows<N>(output, at, results, pixel, channel);
      } else {
        store_packed(output.values + at, load_packed<N>(results.place(pixel, channel)));
      }
    }
  }
}

}  // namespace fastcnn::cuda
