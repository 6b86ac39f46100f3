#pragma once
// What a block of the direct convolution reads: the patch of the image under its tile of output pixels, and the weights
// of its output channels, both brought to shared memory in the order in which they are multiplied.

#include "../math/window.h"
#include "vector.h"

namespace fastcnn::cuda {

constexpr int THREADS = 128;
constexpr int TILE_ROWS = 4;
constexpr int TILE_COLUMNS = 32;
constexpr int TILE_PIXELS = TILE_ROWS * TILE_COLUMNS;

// A pixel of the patch, or a tap of the window, has four channels whatever the input has: the others are zero.
constexpr int MOST_INPUTS = 4;
template <class T>
using Pixel = Vector<T, MOST_INPUTS>;

// In elements, of (N, C, H, W) or (C_out, C, R, S). One image, or one output channel, is indexed in 32 bits.
struct Strides {
  int64_t outer;
  int channel, row, column;
};

// One axis of the window.
struct Side {
  int size, stride, padding, dilation;
};

// The convolution as a block sees it.
struct DirectShape {
  int inputs, outputs;  // channels of a group
  int groups;
  int height, width;  // of the input
  int rows, columns;  // of the convolution's output, without what the pool leaves out
  Side vertical, horizontal;
  int channels;  // output channels of a block
  bool pool;
  Strides input, weight;
  int64_t bias_stride;

  FASTCNN_HOST_DEVICE int taps() const { return vertical.size * horizontal.size; }

  // The matrix instruction takes four taps of four channels at a time.
  FASTCNN_HOST_DEVICE int padded_taps() const { return (taps() + 3) / 4 * 4; }

  FASTCNN_HOST_DEVICE int patch_rows() const {
    return (TILE_ROWS - 1) * vertical.stride + (vertical.size - 1) * vertical.dilation + 1;
  }

  FASTCNN_HOST_DEVICE int patch_columns() const {
    return (TILE_COLUMNS - 1) * horizontal.stride + (horizontal.size - 1) * horizontal.dilation + 1;
  }

  // Pixels from row to row. 7 above a multiple of 16 keeps neighbouring taps of neighbouring pixels in different banks,
  // at stride 1 of a 3x3 as at stride 4 of an 11x11.
  FASTCNN_HOST_DEVICE int patch_pitch() const { return (patch_columns() + 8) / 16 * 16 + 7; }

  FASTCNN_HOST_DEVICE int parts() const { return (outputs + channels - 1) / channels; }  // of a group's channels
};

// Elements from one output channel's weights to the next: padded so that eight rows of a matrix lie in different banks.
template <class T>
FASTCNN_HOST_DEVICE int weight_pitch(const DirectShape& shape) {
  return shape.padded_taps() * MOST_INPUTS + (sizeof(T) == 2 ? 8 : 0);
}

// The tile's pixel, in the order of the products: row by row, or for a pool, window by window.
struct Spot {
  int row, column;
};

__device__ __forceinline__ Spot spot_of(int pixel, bool pool) {
  if (!pool) {
    return {pixel / TILE_COLUMNS, pixel % TILE_COLUMNS};
  }
  const int window = pixel / 4, across = TILE_COLUMNS / 2;
  return {window / across * 2 + pixel / 2 % 2, window % across * 2 + pixel % 2};
}

// Where the patch has the first tap of a pixel of the tile.
__device__ __forceinline__ int patch_start(const DirectShape& shape, int pixel) {
  const Spot spot = spot_of(pixel, shape.pool);
  return spot.row * shape.vertical.stride * shape.patch_pitch() + spot.column * shape.horizontal.stride;
}

// offsets[tap]: how far the patch has a tap from the first one; -1 for the taps that only fill up the last four.
__device__ __forceinline__ void stage_offsets(int* offsets, const DirectShape& shape) {
  for (int tap = threadIdx.x; tap < shape.padded_taps(); tap += THREADS) {
    const int row = tap / shape.horizontal.size * shape.vertical.dilation;
    const int column = tap % shape.horizontal.size * shape.horizontal.dilation;
    offsets[tap] = tap < shape.taps() ? row * shape.patch_pitch() + column : -1;
  }
}

// Up to four channels, zero where there is none.
template <class T>
__device__ __forceinline__ Pixel<T> load_pixel(const T* from, int first, int channel_stride, int channels) {
  Pixel<T> pixel;
#pragma unroll
  for (int c = 0; c < MOST_INPUTS; ++c) {
    pixel.at[c] = c < channels ? from[first + c * channel_stride] : static_cast<T>(0.0f);
  }
  return pixel;
}

// The weights of a tap: in float32 as they come; else as the matrix instruction has its k, a step of four taps being
// channels 0 and 1 of each tap, then channels 2 and 3.
template <class T>
__device__ __forceinline__ void store_tap(T* channel, int tap, const Pixel<T>& weights) {
  if constexpr (sizeof(T) == 4) {
    *reinterpret_cast<Pixel<T>*>(channel + tap * MOST_INPUTS) = weights;
  } else {
    T* step = channel + tap / 4 * 16 + tap % 4 * 2;
    *reinterpret_cast<Vector<T, 2>*>(step) = {weights.at[0], weights.at[1]};
    *reinterpret_cast<Vector<T, 2>*>(step + 8) = {weights.at[2], weights.at[3]};
  }
}

// The weights of `count` output channels from `first`, zeros in what is left of the block's channels. A lane has a tap,
// the warps take turns at the channels.
template <class T>
__device__ __forceinline__ void stage_weights(T* to, const T* weight, const DirectShape& shape, int first, int count) {
  for (int tap = threadIdx.x % WARP; tap < shape.padded_taps(); tap += WARP) {
    const bool filler = tap >= shape.taps();
    const int row = tap / shape.horizontal.size, column = tap % shape.horizontal.size;
    const int offset = filler ? 0 : row * shape.weight.row + column * shape.weight.column;
#pragma unroll 4
    for (int channel = threadIdx.x / WARP; channel < shape.channels; channel += THREADS / WARP) {
      const int inputs = filler || channel >= count ? 0 : shape.inputs;
      const T* from = weight + (first + channel) * shape.weight.outer;
      store_tap(to + channel * weight_pitch<T>(shape), tap, load_pixel(from, offset, shape.weight.channel, inputs));
    }
  }
}

// The patch whose first pixel is (row, column) of the image; zeros outside of it, which is the padding. Warps take
// turns at its rows.
template <class T>
__device__ __forceinline__ void stage_patch(
    Pixel<T>* patch, const T* image, const DirectShape& shape, int row, int column) {
  constexpr int BATCH = 4;  // pixels a thread has under way
  const int columns = shape.patch_columns(), rows = shape.patch_rows(), pitch = shape.patch_pitch();
  int y = threadIdx.x / WARP, x = threadIdx.x % WARP;
  while (y < rows) {
    Pixel<T> pixels[BATCH];
    int places[BATCH];
#pragma unroll
    for (int i = 0; i < BATCH; ++i) {
      const int h = row + y, w = column + x;
      const bool inside = y < rows && x < columns && h >= 0 && h < shape.height && w >= 0 && w < shape.width;
      const int offset = inside ? h * shape.input.row + w * shape.input.column : 0;
      pixels[i] = load_pixel(image, offset, shape.input.channel, inside ? shape.inputs : 0);
      places[i] = y < rows && x < columns ? y * pitch + x : -1;
      x += WARP;
      if (x >= columns) {
        x = threadIdx.x % WARP;
        y += THREADS / WARP;
      }
    }
#pragma unroll
    for (int i = 0; i < BATCH; ++i) {
      if (places[i] >= 0) {
        patch[places[i]] = pixels[i];
      }
    }
  }
}

}  // namespace fastcnn::cuda
