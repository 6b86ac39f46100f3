// Convolution + ReLU: torch's convolution, then ReLU in place; backward masks the gradient and sums the bias gradient
// in one pass. linear_relu shares both passes: its rows are the pixels of an image whose channels are contiguous.

#include "conv_relu.h"

#include "../math/select.h"
#include "../ops.h"
#include "convolution.h"
#include "sums.h"
#include "threads.h"

namespace fastcnn::cpu {
namespace {

constexpr int64_t LINES_A_SUM = 16;  // NHWC: pixels that one partial sum of the bias gradient covers

template <class T>
FASTCNN_CLONES void relu_range(T* y, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    y[i] = static_cast<T>(relu(static_cast<float>(y[i])));
  }
}

// Mask the planes [begin, end) of an NCHW gradient, and sum each.
template <class T>
FASTCNN_CLONES void mask_planes(
    const T* grad, const T* y, T* dx, float* sums, int64_t pixels, int64_t begin, int64_t end) {
  for (int64_t p = begin; p < end; ++p) {
    const T* __restrict from = grad + p * pixels, * __restrict output = y + p * pixels;
    T* __restrict to = dx + p * pixels;
    for (int64_t i = 0; i < pixels; ++i) {
      const float value = static_cast<float>(from[i]);
      to[i] = static_cast<T>(relu_off(static_cast<float>(output[i])) ? 0.0f : value);
    }
    if (sums) {
      sums[p] = sum(to, pixels);
    }
  }
}

// Mask the lines [begin, end) of LINES_A_SUM NHWC pixels each, and sum each by channel.
template <class T>
FASTCNN_CLONES void mask_pixels(
    const T* grad, const T* y, T* dx, float* sums, int64_t pixels, int64_t channels, int64_t begin, int64_t end) {
  for (int64_t line = begin; line < end; ++line) {
    float* __restrict sum = sums ? sums + line * channels : nullptr;
    const int64_t last = std::min((line + 1) * LINES_A_SUM, pixels);
    for (int64_t p = line * LINES_A_SUM; p < last; ++p) {
      const T* __restrict from = grad + p * channels, * __restrict output = y + p * channels;
      T* __restrict to = dx + p * channels;
      for (int64_t c = 0; c < channels; ++c) {
        const float value = static_cast<float>(from[c]);
        to[c] = static_cast<T>(relu_off(static_cast<float>(output[c])) ? 0.0f : value);
      }
      for (int64_t c = 0; sum && c < channels; ++c) {
        sum[c] += static_cast<float>(to[c]);
      }
    }
  }
}

template <class T>
void run_mask(const Tensor& grad, const Tensor& y, Tensor& dx, Tensor& bias, const Layout& layout) {
  const T *from = data<T>(grad), *output = data<T>(y);
  T* to = mutable_data<T>(dx);
  const bool bias_grad = bias.numel() > 0;
  const int64_t pixels = layout.images * layout.pixels, channels = layout.channels;
  const int64_t lines = layout.channels_last ? ceil_div(pixels, LINES_A_SUM) : layout.images;
  std::vector<float> partial(bias_grad ? lines * channels : 0);
  float* sums = bias_grad ? partial.data() : nullptr;
  if (layout.channels_last) {
    parallel(lines, LINES_A_SUM * channels,
        [&](int64_t begin, int64_t end) { mask_pixels(from, output, to, sums, pixels, channels, begin, end); });
  } else {
    parallel(layout.images * channels, layout.pixels,
        [&](int64_t begin, int64_t end) { mask_planes(from, output, to, sums, layout.pixels, begin, end); });
  }
  if (bias_grad) {
    add_partial_sums(sums, lines, channels, mutable_data<T>(bias));
  }
}

std::tuple<Tensor, Tensor> mask(const Tensor& grad, const Tensor& output, const Layout& layout, bool bias_grad) {
  const std::vector<int64_t> bias_sizes{bias_grad ? layout.channels : 0};
  Tensor dx = new_tensor(output, output.sizes(), output.scalar_type(), output.dim() == 4 && layout.channels_last);
  Tensor bias = new_tensor(output, bias_sizes, output.scalar_type(), false);
  with_type("conv_relu_backward", output, [&](auto type) { run_mask<decltype(type)>(grad, output, dx, bias, layout); });
  return {dx, bias};
}

}  // namespace

void relu_in_place(Tensor& y) {
  with_type("relu", y, [&](auto type) {
    auto* values = mutable_data<decltype(type)>(y);
    parallel(y.numel(), 1, [&](int64_t begin, int64_t end) { relu_range(values, begin, end); });
  });
}

Tensor conv_relu(const Tensor& input, const Tensor& weight, std::optional<Tensor> bias, Sizes stride, Sizes padding,
    Sizes dilation, int64_t groups, std::optional<std::string>) {
  Tensor y = convolution(input, weight, bias, stride, padding, dilation, groups);
  relu_in_place(y);
  return y;
}

std::tuple<Tensor, Tensor> conv_relu_backward(const Tensor& grad, const Tensor& output, bool bias_grad) {
  STD_TORCH_CHECK(output.dim() == 4, "conv_relu_backward: expected (N, C, H, W), got ", output.dim(), " axes");
  check_same_shape("conv_relu_backward", grad, output);
  const bool channels_last = is_channels_last(output);
  const Tensor y = dense(output, channels_last);
  return mask(dense(grad, channels_last), y, layout(y, channels_last), bias_grad);
}

std::tuple<Tensor, Tensor> linear_relu_backward(const Tensor& grad, const Tensor& output, bool bias_grad) {
  STD_TORCH_CHECK(output.dim() == 2, "linear_relu_backward: expected (N, features), got ", output.dim(), " axes");
  check_same_shape("linear_relu_backward", grad, output);
  return mask(dense(grad, false), dense(output, false), {output.size(0), output.size(1), 1, true}, bias_grad);
}

}  // namespace fastcnn::cpu
