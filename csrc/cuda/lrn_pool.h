#pragma once
// The max-pool behind an LRN: its windows in 32 bits, and the gradient that its codes send back.

#include "lrn.h"
#include "max_pool.h"

namespace fastcnn::cuda {

// Call visit(window, place) for the windows of an axis, `windows` in all, that cover a pixel.
template <class Visit>
__device__ __forceinline__ void visit_windows(
    const AxisOf<int32_t>& axis, int32_t windows, int32_t pixel, const Visit& visit) {
  int32_t window = last_window(axis, pixel, windows);
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
  Window32 window;
  Plane32 plane;

  __device__ __forceinline__ int64_t windows() const {
    return static_cast<int64_t>(plane.out_height) * plane.out_width;
  }

  // Call visit(window, code) for the windows of an image that cover its pixel, with the code that chooses it.
  template <class Visit>
  __device__ __forceinline__ void visit_all(uint32_t pixel, const Visit& visit) const {
    const auto width = static_cast<uint32_t>(plane.width);
    const uint32_t row = pixel / width, column = pixel - row * width;
    visit_windows(window.rows, plane.out_height, static_cast<int32_t>(row), [&](int32_t down, int32_t r) {
      visit_windows(window.columns, plane.out_width, static_cast<int32_t>(column), [&](int32_t right, int32_t s) {
        visit(static_cast<int64_t>(down) * plane.out_width + right, code_of(r, s, window.columns));
      });
    });
  }

  template <Path PATH>
  __device__ __forceinline__ Values<float, RUN<T> + 2 * REACH> of_run(const Run& run) const {
    constexpr bool CHANNELS_LAST = PATH == Path::VECTORS;
    Values<float, RUN<T> + 2 * REACH> total = {};
    Run pooled = run;
    pooled.step = CHANNELS_LAST ? 1 : windows();
    visit_all(run.pixel, [&](int64_t covering, int32_t chosen) {
      pooled.begin = run.image * run.channels * windows() + covering * (CHANNELS_LAST ? run.channels : 1);
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
    visit_all(element.pixel, [&](int64_t covering, int32_t chosen) {
      const int64_t at = first + covering * (layout.channels_last ? layout.channels : 1);
      total += codes[at] == chosen ? static_cast<float>(grad[at]) : 0.0f;
    });
    return total;
  }
};

}  // namespace fastcnn::cuda
