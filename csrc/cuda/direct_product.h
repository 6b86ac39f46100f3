#pragma once
// The products of the direct convolution: what a thread sums up of a tile of pixels times a block's output channels, on
// tensor cores in 16 bits and by plain multiply-adds in float32.

#include <bit>

#include "../math/select.h"
#include "direct_patch.h"

namespace fastcnn::cuda {

// What the products read of shared memory.
template <class T>
struct Operands {
  const Pixel<T>* patch;
  const int* offsets;
  const T* weights;
};

// The tile's results, in the order of the output: [pixel][channel] or [channel][pixel]. Rows are 16 bytes longer than
// their values, so that those of neighbouring rows lie in different banks.
template <class T, int CHANNELS>
struct Results {
  static constexpr int GAP = 16 / sizeof(T), SIZE = TILE_PIXELS * (CHANNELS + GAP);
  static_assert(CHANNELS <= TILE_PIXELS, "SIZE is that of the larger order");
  T* at;
  bool channels_last;

  __device__ __forceinline__ T* place(int pixel, int channel) const {
    return at + (channels_last ? pixel * (CHANNELS + GAP) + channel : channel * (TILE_PIXELS + GAP) + pixel);
  }
};

// Bias, ReLU, and the rounding to the output's type.
template <class T>
__device__ __forceinline__ T finish(float sum, float bias) {
  return static_cast<T>(relu(sum + bias));
}

// The sums of a block that has up to CHANNELS output channels.
template <class T, int CHANNELS>
struct Sums;

// 16-bit types: a warp multiplies 32 pixels by all channels, 16 by 8 an instruction.
template <class T, int CHANNELS>
struct Sums {
  static constexpr int M_TILES = TILE_PIXELS / (THREADS / WARP) / 16;
  float at[M_TILES][CHANNELS / 8][4] = {};

  // The pixels of a thread's accumulators: two an instruction, eight rows apart.
  static __device__ __forceinline__ int pixel(int i) {
    return threadIdx.x / WARP * M_TILES * 16 + i * 8 + threadIdx.x % WARP / 4;
  }

  // Four taps a step, one a lane of four: its four channels are the lane's two registers of a row of A.
  __device__ __forceinline__ void multiply(const Operands<T>& operands, const DirectShape& shape) {
    const int lane = threadIdx.x % WARP, pitch = weight_pitch<T>(shape);
    int start[2 * M_TILES];
#pragma unroll
    for (int i = 0; i < 2 * M_TILES; ++i) {
      start[i] = patch_start(shape, pixel(i));
    }
    const T* row = operands.weights + (lane / 16 * 8 + lane % 8) * pitch + lane / 8 % 2 * 8;
#pragma unroll 1
    for (int step = 0; step < shape.padded_taps() / 4; ++step) {
      const int offset = operands.offsets[step * 4 + lane % 4];
      uint32_t a[M_TILES][4];
#pragma unroll
      for (int i = 0; i < 2 * M_TILES; ++i) {
        Vector<uint32_t, 2> pairs{};  // zeros, not data, where there is no tap: zero times infinity is not zero
        if (offset >= 0) {
          pairs = std::bit_cast<Vector<uint32_t, 2>>(operands.patch[start[i] + offset]);
        }
        a[i / 2][i % 2] = pairs.at[0];
        a[i / 2][i % 2 + 2] = pairs.at[1];
      }
#pragma unroll
      for (int n = 0; n < CHANNELS / 16; ++n) {
        uint32_t b[4];
        load_matrices(b, row + n * 16 * pitch + step * 16);
#pragma unroll
        for (int m = 0; m < M_TILES; ++m) {
          mma<T>(at[m][2 * n], a[m], {b[0], b[1]});
          mma<T>(at[m][2 * n + 1], a[m], {b[2], b[3]});
        }
      }
    }
  }

  __device__ __forceinline__ void stage(
      const Results<T, CHANNELS>& results, const float* bias, const DirectShape&) const {
#pragma unroll
    for (int n = 0; n < CHANNELS / 8; ++n) {
      const int channel = n * 8 + threadIdx.x % 4 * 2;
      const float biases[2] = {bias[channel], bias[channel + 1]};
#pragma unroll
      for (int i = 0; i < 2 * M_TILES; ++i) {
        const float* sums = at[i / 2][n] + i % 2 * 2;
        const Vector<T, 2> pair{finish<T>(sums[0], biases[0]), finish<T>(sums[1], biases[1])};
        if (results.channels_last) {
          *reinterpret_cast<uint32_t*>(results.place(pixel(i), channel)) = std::bit_cast<uint32_t>(pair);
        } else {
          *results.place(pixel(i), channel) = pair.at[0];
          *results.place(pixel(i), channel + 1) = pair.at[1];
        }
      }
    }
  }
};

// float32: a warp multiplies all pixels by eight channels, a thread four pixels by the same.
template <int CHANNELS>
struct Sums<float, CHANNELS> {
  static_assert(CHANNELS == THREADS / WARP * 8);
  static constexpr int EACH = 8;  // channels of a thread
  static constexpr int PIXELS = TILE_PIXELS / WARP;
  float at[PIXELS][EACH] = {};

  // Neighbouring lanes have neighbouring pixels, or windows.
  static __device__ __forceinline__ int pixel(int i, bool pool) {
    const int lane = threadIdx.x % WARP;
    return pool ? lane * PIXELS + i : i * WARP + lane;
  }

  static __device__ __forceinline__ int first_channel() { return threadIdx.x / WARP * EACH; }

  __device__ __forceinline__ void multiply(const Operands<float>& operands, const DirectShape& shape) {
    if (first_channel() >= shape.channels) {
      return;
    }
    const int pitch = weight_pitch<float>(shape);
    const float* weights = operands.weights + first_channel() * pitch;
    const Pixel<float>* start[PIXELS];
#pragma unroll
    for (int i = 0; i < PIXELS; ++i) {
      start[i] = operands.patch + patch_start(shape, pixel(i, shape.pool));
    }
    for (int tap = 0; tap < shape.taps(); ++tap) {
      const int offset = operands.offsets[tap];
      Pixel<float> x[PIXELS], w[EACH];
#pragma unroll
      for (int i = 0; i < PIXELS; ++i) {
        x[i] = start[i][offset];
      }
#pragma unroll
      for (int n = 0; n < EACH; ++n) {
        w[n] = *reinterpret_cast<const Pixel<float>*>(weights + n * pitch + tap * MOST_INPUTS);
      }
#pragma unroll
      for (int c = 0; c < MOST_INPUTS; ++c) {
        if (c < shape.inputs) {
          add_products(x, w, c);
        }
      }
    }
  }

  __device__ __forceinline__ void add_products(const Pixel<float> (&x)[PIXELS], const Pixel<float> (&w)[EACH], int c) {
#pragma unroll
    for (int i = 0; i < PIXELS; ++i) {
#pragma unroll
      for (int n = 0; n < EACH; ++n) {
        at[i][n] += x[i].at[c] * w[n].at[c];
      }
    }
  }

  __device__ __forceinline__ void stage(
      const Results<float, CHANNELS>& results, const float* bias, const DirectShape& shape) const {
    if (first_channel() >= shape.channels) {
      return;
    }
#pragma unroll
    for (int i = 0; i < PIXELS; ++i) {
#pragma unroll
      for (int n = 0; n < EACH; n += 4) {
        const int channel = first_channel() + n;
        Vector<float, 4> values;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          values.at[j] = finish<float>(at[i][n + j], bias[channel + j]);
        }
        const int pixel = this->pixel(i, shape.pool);
        if (results.channels_last) {
          *reinterpret_cast<Vector<float, 4>*>(results.place(pixel, channel)) = values;
        } else {
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            *results.place(pixel, channel + j) = values.at[j];
          }
        }
      }
    }
  }
};

}  // namespace fastcnn::cuda
