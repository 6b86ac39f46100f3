#pragma once
// The products of the direct convolution: what a thread sums up of a tile of pixels times a block's output channels, on
// tensor cores in 16 bits and by plain multiply-adds in float32.

#include <bit>

#include "../math/select.h"
#include "direct_patch.h"

namespace fastcnn::cuda {

// What the products read of shared memory.
template <class T>
struct Factors {
  const Pixel<T>* patch;
  const int* offsets;
  const T* weights;
  const float* bias;
};

// The tile's results, in the order of the output: [pixel][channel] or [channel][pixel], rows 16 bytes apart in banks.
template <class T>
struct Staged {
  T* at;
  int pixel_step, channel_step;  // one of them is 1

  __device__ __forceinline__ T* place(int pixel, int channel) const {
    return at + pixel * pixel_step + channel * channel_step;
  }
};

template <class T>
FASTCNN_HOST_DEVICE int staged_pitch(int channels, bool channels_last) {
  return (channels_last ? channels : TILE_PIXELS) + 16 / static_cast<int>(sizeof(T));
}

// Bias, ReLU, and the rounding to the output's type.
template <class T>
__device__ __forceinline__ T finish(float sum, float bias) {
  return static_cast<T>(relu(sum + bias));
}

// 16-bit types: a warp multiplies 32 pixels by up to 64 channels, 16 by 8 an instruction.
template <class T>
struct Sums {
  static constexpr int MOST_CHANNELS = 64, CHANNEL_STEP = 16;
  static constexpr int M_TILES = TILE_PIXELS / (THREADS / WARP) / 16;
  float at[M_TILES][MOST_CHANNELS / 8][4] = {};

  // The pixels of a thread's accumulators, `half` being the lower or upper eight rows of an instruction.
  static __device__ __forceinline__ int pixel(int m, int half) {
    const int lane = threadIdx.x % WARP;
    return (threadIdx.x / WARP * M_TILES + m) * 16 + half * 8 + lane / 4;
  }

  // Four taps a step, one a lane of four: its four channels are the lane's two registers of a row of A.
  __device__ __forceinline__ void multiply(const Factors<T>& factors, const DirectShape& shape) {
    const int lane = threadIdx.x % WARP, pitch = weight_pitch<T>(shape);
    int start[M_TILES][2];
#pragma unroll
    for (int i = 0; i < 2 * M_TILES; ++i) {
      start[i / 2][i % 2] = patch_start(shape, pixel(i / 2, i % 2));
    }
    const T* row = factors.weights + (lane / 16 * 8 + lane % 8) * pitch + lane / 8 % 2 * 8;
    for (int step = 0; step < shape.padded_taps() / 4; ++step) {
      const int offset = factors.offsets[step * 4 + lane % 4];
      uint32_t a[M_TILES][4];
#pragma unroll
      for (int i = 0; i < 2 * M_TILES; ++i) {
        Vector<uint32_t, 2> pairs{};  // zeros, not data, where there is no tap: zero times infinity is not zero
        if (offset >= 0) {
          pairs = std::bit_cast<Vector<uint32_t, 2>>(factors.patch[start[i / 2][i % 2] + offset]);
        }
        a[i / 2][i % 2] = pairs.at[0];
        a[i / 2][i % 2 + 2] = pairs.at[1];
      }
#pragma unroll
      for (int n = 0; n < MOST_CHANNELS / 16; ++n) {
        if (n * 16 < shape.channels) {
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
  }

  __device__ __forceinline__ void stage(const Staged<T>& staged, const float* bias, const DirectShape& shape) const {
#pragma unroll
    for (int n = 0; n < MOST_CHANNELS / 8; ++n) {
      const int channel = n * 8 + threadIdx.x % 4 * 2;
      if (n * 8 < shape.channels) {
#pragma unroll
        for (int i = 0; i < 2 * M_TILES; ++i) {
          const float* sums = at[i / 2][n] + i % 2 * 2;
          const Vector<T, 2> pair{finish<T>(sums[0], bias[channel]), finish<T>(sums[1], bias[channel + 1])};
          T* place = staged.place(pixel(i / 2, i % 2), channel);
          if (staged.channel_step == 1) {
            *reinterpret_cast<Vector<T, 2>*>(place) = pair;
          } else {
            place[0] = pair.at[0];
            place[staged.channel_step] = pair.at[1];
          }
        }
      }
    }
  }
};

// float32: a warp multiplies all pixels by eight channels, a thread four pixels by the same.
template <>
struct Sums<float> {
  static constexpr int CHANNEL_STEP = 8, MOST_CHANNELS = THREADS / WARP * CHANNEL_STEP;
  static constexpr int PIXELS = TILE_PIXELS / WARP;
  float at[PIXELS][CHANNEL_STEP] = {};

  // Neighbouring lanes have neighbouring pixels, or windows.
  static __device__ __forceinline__ int pixel(int i, bool pool) {
    const int lane = threadIdx.x % WARP;
    return pool ? lane * PIXELS + i : i * WARP + lane;
  }

  static __device__ __forceinline__ int first_channel() { return threadIdx.x / WARP * CHANNEL_STEP; }

  __device__ __forceinline__ void multiply(const Factors<float>& factors, const DirectShape& shape) {
    if (first_channel() >= shape.channels) {
      return;
    }
    const int pitch = weight_pitch<float>(shape);
    const float* weights = factors.weights + first_channel() * pitch;
    const Pixel<float>* start[PIXELS];
#pragma unroll
    for (int i = 0; i < PIXELS; ++i) {
      start[i] = factors.patch + patch_start(shape, pixel(i, shape.pool));
    }
    for (int tap = 0; tap < shape.taps(); ++tap) {
      const int offset = factors.offsets[tap];
      Pixel<float> x[PIXELS], w[CHANNEL_STEP];
#pragma unroll
      for (int i = 0; i < PIXELS; ++i) {
        x[i] = start[i][offset];
      }
#pragma unroll
      for (int n = 0; n < CHANNEL_STEP; ++n) {
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

  __device__ __forceinline__ void add_products(
      const Pixel<float> (&x)[PIXELS], const Pixel<float> (&w)[CHANNEL_STEP], int c) {
#pragma unroll
    for (int i = 0; i < PIXELS; ++i) {
#pragma unroll
      for (int n = 0; n < CHANNEL_STEP; ++n) {
        at[i][n] += x[i].at[c] * w[n].at[c];
      }
    }
  }

  __device__ __forceinline__ void stage(
      const Staged<float>& staged, const float* bias, const DirectShape& shape) const {
    if (first_channel() >= shape.channels) {
      return;
    }
#pragma unroll
    for (int i = 0; i < PIXELS; ++i) {
#pragma unroll
      for (int n = 0; n < CHANNEL_STEP; n += 4) {
        const int channel = first_channel() + n;
        Vector<float, 4> values;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          values.at[j] = finish<float>(at[i][n + j], bias[channel + j]);
        }
        float* place = staged.place(pixel(i, shape.pool), channel);
        if (staged.channel_step == 1) {
          *reinterpret_cast<Vector<float, 4>*>(place) = values;
        } else {
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            place[j * staged.channel_step] = values.at[j];
          }
        }
      }
    }
  }
};

}  // namespace fastcnn::cuda
