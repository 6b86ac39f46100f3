#pragma once
// The max-pool behind an LRN: its windows in 32 bits, and the gradient that its codes send back.

#include "../math/select.h"
#include "lrn.h"

namespace fastcnn::cuda {

struct PoolAxis {
  int32_t size;
  int32_t stride;
  int32_t padding;
  int32_t dilation;
  int32_t length;   // pixels
  int32_t windows;  // of the output
};

struct Pool {
  PoolAxis rows;
  PoolAxis columns;
};

inline PoolAxis narrow(const Axis& axis, int64_t length, int64_t windows) {
  STD_TORCH_CHECK(axis.size > 0 && axis.stride > 0 && axis.padding >= 0 && axis.dilation > 0 &&
                      length + 2 * axis.padding + span(axis) + axis.stride <= std::numeric_limits<int32_t>::max(),
      "lrn_pool: a window or an image of this size is not supported");
  return {static_cast<int32_t>(axis.size), static_cast<int32_t>(axis.stride), static_cast<int32_t>(axis.padding),
      static_cast<int32_t>(axis.dilation), static_cast<int32_t>(length), static_cast<int32_t>(windows)};
}

inline Pool make_pool(const Window& window, const Plane& plane) {
  return {narrow(window.rows, plane.height, plane.out_height), narrow(window.columns, plane.width, plane.out_width)};
}

FASTCNN_HOST_DEVICE int32_t span(const PoolAxis& axis) { return axis.dilation * (axis.size - 1) + 1; }

FASTCNN_HOST_DEVICE int32_t first_pixel(const PoolAxis& axis, int32_t window) {
  return window * axis.stride - axis.padding;
}

// Call visit(window, place) for the windows that cover a pixel.
template <class Visit>
__device__ __forceinline__ void visit_windows(const PoolAxis& axis, int32_t pixel, const Visit& visit) {
  int32_t window = (pixel + axis.padding) / axis.stride;
  window = window < axis.windows ? window : axis.windows - 1;
  int32_t distance = pixel - first_pixel(axis, window);
  for (; window >= 0 && distance < span(axis); --window, distance += axis.stride) {
    const int32_t place = axis.dilation == 1 ? distance : distance / axis.dilation;
    if (place * axis.dilation == distance) {
      visit(window, place);
    }
  }
}

// The gradient of an LRN's output: what the windows that chose it got.
template <class T>
struct PooledGradient {
  const T* grad;         // (N, C, OH, OW) in x's layout
  const uint8_t* codes;  // the same
  Pool pool;

  __device__ __forceinline__ int64_t windows() const {
    return static_cast<int64_t>(pool.rows.windows) * pool.columns.windows;
  }

  // Call visit(window, code) for the windows of an image that cover its pixel, with the code that chooses it.
  template <class Visit>
  __device__ __forceinline__ void visit_all(uint32_t pixel, const Visit& visit) const {
    const auto width = static_cast<uint32_t>(pool.columns.length);
    const uint32_t row = pixel / width, column = pixel - row * width;
    visit_windows(pool.rows, static_cast<int32_t>(row), [&](int32_t down, int32_t r) {
      visit_windows(pool.columns, static_cast<int32_t>(column), [&](int32_t right, int32_t s) {
        visit(static_cast<int64_t>(down) * pool.columns.windows + right, r * pool.columns.size + s);
      });
    });
  }

  template <Path PATH>
  __device__ __forceinline__ Values<float, RUN<T> + 2 * REACH> of_run(const Run& run) const {
    constexpr bool CHANNELS_LAST = PATH == Path::VECTORS;
    Values<float, RUN<T> + 2 * REACH> total = {};
    Run pooled = run;
    pooled.step = CHANNELS_LAST ? 1 : windows();
    visit_all(run.pixel, [&](int64_t window, int32_t chosen) {
      pooled.begin = run.image * run.channels * windows() + window * (CHANNELS_LAST ? run.channels : 1);
      const auto code = load_run<PATH, T, REACH, int32_t>(codes, pooled);
      const auto value = load_run<PATH, T, REACH>(grad, pooled);
#pragma unroll
      for (int i = 0; i < RUN<T> + 2 * REACH; ++i) {
        if (code.at[i] == chosen) {
          total.at[i] += value.at[i];
        }
      }
    });
    return total;
  }

  __device__ __forceinline__ float of_element(int64_t, const Element& element, const Layout& layout) const {
    const int64_t first =
        element.image * layout.channels * windows() + element.channel * (layout.channels_last ? 1 : windows());
    float total = 0.0f;
    visit_all(element.pixel, [&](int64_t window, int32_t chosen) {
      const int64_t at = first + window * (layout.channels_last ? layout.channels : 1);
      total += codes[at] == chosen ? static_cast<float>(grad[at]) : 0.0f;
    });
    return total;
  }
};

}  // namespace fastcnn::cuda
