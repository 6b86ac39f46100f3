// Max-pool's backward: each gradient goes to the pixel that its code names; with the sums for a bias gradient if asked.
//
// NCHW: a plane's gradients are added where they go. NHWC: an input row gathers from the windows over it.

#include "max_pool.h"

#include <array>
#include <cstring>
#include <type_traits>

#include "../ops.h"
#include "sums.h"
#include "threads.h"

namespace fastcnn::cpu {
namespace {

// Add each gradient of the planes [begin, end) to its winner's, and all of a plane's into `sums` if it is not null.
template <class T>
FASTCNN_CLONES void unpool_planes(const T* grad, const uint8_t* codes, T* dx, float* sums, const Plane& plane,
    const Window& window, int64_t begin, int64_t end) {
  constexpr bool WIDE = sizeof(T) < sizeof(float);  // gradients that meet are added in float32
  const int64_t pixels = plane.height * plane.width, outputs = plane.out_height * plane.out_width;
  std::vector<float> wide(WIDE ? pixels : 0), flowing(sums ? outputs : 0);
  int64_t offsets[RELU_OFF + 1] = {};
  for (int32_t code = 0; code < window.rows.size * window.columns.size; ++code) {
    offsets[code] = row_of(code, window.columns) * window.rows.dilation * plane.width +
                    column_of(code, window.columns) * window.columns.dilation;
  }
  for (int64_t p = begin; p < end; ++p) {
    const T* __restrict from = grad + p * outputs;
    const uint8_t* __restrict code = codes + p * outputs;
    float* to = WIDE ? wide.data() : reinterpret_cast<float*>(dx + p * pixels);
    std::memset(to, 0, pixels * sizeof(float));
    float nowhere = 0.0f;
    for (int64_t oh = 0; oh < plane.out_height; ++oh) {
      float* row = to + first_pixel(window.rows, oh) * plane.width - window.columns.padding;
      for (int64_t ow = 0; ow < plane.out_width; ++ow) {
        const int64_t i = oh * plane.out_width + ow;
        float* target = code[i] == RELU_OFF ? &nowhere : row + ow * window.columns.stride + offsets[code[i]];
        *target += static_cast<float>(from[i]);
      }
    }
    if (WIDE) {
      T* __restrict out = dx + p * pixels;
      for (int64_t i = 0; i < pixels; ++i) {
        out[i] = static_cast<T>(to[i]);
      }
    }
    if (sums) {
      float* __restrict flow = flowing.data();
      for (int64_t i = 0; i < outputs; ++i) {
        flow[i] = code[i] == RELU_OFF ? 0.0f : static_cast<float>(from[i]);
      }
      sums[p] = sum(flow, outputs);
    }
  }
}

template <class T>
FASTCNN_CLONES void widen(const T* __restrict from, float* __restrict to, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    to[i] = static_cast<float>(from[i]);
  }
}

// Gather the gradients of the input rows [begin, end), counted over all images, of an NHWC tensor.
template <class T>
FASTCNN_CLONES void unpool_pixels(const float* grad, const uint8_t* codes, T* dx, const Plane& plane, int64_t channels,
    const Window& window, int64_t begin, int64_t end) {
  const Axis &rows = window.rows, &columns = window.columns;
  std::vector<float> total(channels);
  float* __restrict sum = total.data();
  for (int64_t line = begin; line < end; ++line) {
    const int64_t image = line / plane.height, h = line % plane.height;
    const int64_t top = first_window(rows, h), bottom = last_window(rows, h, plane.out_height);
    for (int64_t w = 0; w < plane.width; ++w) {
      std::fill(total.begin(), total.end(), 0.0f);
      for (int64_t oh = top; oh <= bottom; ++oh) {
        const int64_t r = place_at(rows, oh, h);
        const int64_t right = last_window(columns, w, plane.out_width);
        for (int64_t ow = first_window(columns, w); r >= 0 && ow <= right; ++ow) {
          const int64_t s = place_at(columns, ow, w);
          if (s < 0) {
            continue;
          }
          const int64_t at = ((image * plane.out_height + oh) * plane.out_width + ow) * channels;
          const uint8_t* __restrict code = codes + at;
          const float* __restrict from = grad + at;
          const uint8_t place = static_cast<uint8_t>(code_of(r, s, columns));
          for (int64_t c = 0; c < channels; ++c) {
            sum[c] += code[c] == place ? from[c] : 0.0f;
          }
        }
      }
      T* __restrict out = dx + (line * plane.width + w) * channels;
      for (int64_t c = 0; c < channels; ++c) {
        out[c] = static_cast<T>(sum[c]);
      }
    }
  }
}

// The sums of the gradients that flow, by output row, of an NHWC tensor: sums is (rows, C).
FASTCNN_CLONES void sum_pixels(const float* grad, const uint8_t* codes, float* sums, int64_t pixels, int64_t channels,
    int64_t begin, int64_t end) {
  for (int64_t line = begin; line < end; ++line) {
    float* __restrict sum = sums + line * channels;
    std::memset(sum, 0, channels * sizeof(float));
    for (int64_t i = line * pixels; i < (line + 1) * pixels; ++i) {
      const float* __restrict from = grad + i * channels;
      const uint8_t* __restrict code = codes + i * channels;
      for (int64_t c = 0; c < channels; ++c) {
        sum[c] += code[c] == RELU_OFF ? 0.0f : from[c];
      }
    }
  }
}

// How many partial sums of each channel pool_backward_into leaves.
int64_t sums_of(const Plane& plane, const Layout& layout) {
  return layout.images * (layout.channels_last ? plane.out_height : 1);
}

}  // namespace

template <class T>
void pool_backward_into(const T* grad, const uint8_t* codes, T* dx, float* sums, const Plane& plane,
    const Layout& layout, const Window& window) {
  const int64_t channels = layout.channels;
  if (!layout.channels_last) {
    parallel(layout.images * channels, layout.pixels,
        [&](int64_t begin, int64_t end) { unpool_planes(grad, codes, dx, sums, plane, window, begin, end); });
    return;
  }
  const int64_t count = layout.images * plane.out_height * plane.out_width * channels;
  std::vector<float> wide(std::is_same_v<T, float> ? 0 : count);
  parallel(
      static_cast<int64_t>(wide.size()), 1, [&](int64_t begin, int64_t end) { widen(grad, wide.data(), begin, end); });
  const float* gradient = wide.empty() ? reinterpret_cast<const float*>(grad) : wide.data();
  parallel(layout.images * plane.height, plane.width * channels * 4,
      [&](int64_t begin, int64_t end) { unpool_pixels(gradient, codes, dx, plane, channels, window, begin, end); });
  if (sums) {
    parallel(sums_of(plane, layout), plane.out_width * channels,
        [&](int64_t begin, int64_t end) { sum_pixels(gradient, codes, sums, plane.out_width, channels, begin, end); });
  }
}

#define FASTCNN_POOL(T) \
  template void pool_backward_into(const T*, const uint8_t*, T*, float*, const Plane&, const Layout&, const Window&)
FASTCNN_POOL(float);
FASTCNN_POOL(BFloat16);
FASTCNN_POOL(Half);
#undef FASTCNN_POOL

Tensor pool_backward(
    const Tensor& grad, const Tensor& codes, int64_t height, int64_t width, const Window& window, Tensor* bias) {
  STD_TORCH_CHECK(
      codes.dim() == 4 && grad.dim() == 4, "max_pool_backward: expected gradients and codes (N, C, OH, OW)");
  const Sizes of_codes = codes.sizes(), of_grad = grad.sizes();
  for (int64_t axis = 0; axis < 4; ++axis) {
    STD_TORCH_CHECK(of_grad[axis] == of_codes[axis], "max_pool_backward: gradients and codes differ in shape");
  }
  const bool channels_last = is_channels_last(codes);
  const Tensor from = dense(grad, channels_last), code = dense(codes, channels_last);
  const int64_t images = of_codes[0], channels = of_codes[1];
  const Layout shape{images, channels, height * width, channels_last};
  const Plane plane{height, width, of_codes[2], of_codes[3]};
  const std::array<int64_t, 4> sizes{images, channels, height, width};
  Tensor dx = new_tensor(grad, sizes, grad.scalar_type(), channels_last);
  with_type("max_pool_backward", from, [&](auto type) {
    using T = decltype(type);
    std::vector<float> sums(bias ? sums_of(plane, shape) * channels : 0);
    pool_backward_into(
        data<T>(from), data<uint8_t>(code), mutable_data<T>(dx), bias ? sums.data() : nullptr, plane, shape, window);
    if (bias) {
      add_partial_sums(sums.data(), sums_of(plane, shape), channels, mutable_data<T>(*bias));
    }
  });
  return dx;
}

Tensor max_pool_backward(const Tensor& grad, const Tensor& codes, int64_t height, int64_t width, const Window& window) {
  return pool_backward(grad, codes, height, width, window, nullptr);
}

}  // namespace fastcnn::cpu
