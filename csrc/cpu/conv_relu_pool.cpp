// Convolution + ReLU + max-pool: torch's convolution, then one pass to pooled values and codes.

#include "../ops.h"
#include "convolution.h"
#include "max_pool.h"

namespace fastcnn::cpu {
namespace {

// torch's float32 convolution computes blocks, and copies them to NCHW in a pass of its own. Where the activations
// exceed a cache it is cheaper to get them as channels_last, by a channels_last weight, and to turn the pooled values
// to NCHW.
bool is_cheaper_turned(const Tensor& input, const Tensor& weight, const Plane& plane) {
  constexpr int64_t LEAST = 1 << 21, LEAST_A_WEIGHT = 16;
  const int64_t activations = input.size(0) * weight.size(0) * plane.out_height * plane.out_width;
  return activations >= LEAST && activations >= LEAST_A_WEIGHT * weight.numel() &&
         input.scalar_type() == torch::headeronly::ScalarType::Float && !is_channels_last(input) &&
         !is_channels_last(weight);
}

std::tuple<Tensor, Tensor> conv_pool(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
    Sizes stride, Sizes padding, Sizes dilation, int64_t groups, const Window& window, bool codes) {
  const std::vector<int64_t> size{weight.size(2), weight.size(3)};
  const Window kernel = make_window(size, stride, padding, dilation, false);
  if (!is_cheaper_turned(input, weight, make_plane(kernel, input.size(2), input.size(3)))) {
    return pool(convolution(input, weight, bias, stride, padding, dilation, groups), window, true, codes);
  }
  Tensor turned = new_tensor(weight, weight.sizes(), weight.scalar_type(), true);
  torch::stable::copy_(turned, weight);  // contiguous() would leave a weight of one input channel as it is
  const auto [values, places] =
      pool(convolution(input, turned, bias, stride, padding, dilation, groups), window, true, codes);
  return {dense(values, false), dense(places, false)};
}

}  // namespace

Tensor conv_relu_pool(const Tensor& input, const Tensor& weight, std::optional<Tensor> bias, Sizes stride,
    Sizes padding, Sizes dilation, int64_t groups, std::optional<std::string>, const Window& window) {
  return std::get<0>(conv_pool(input, weight, bias, stride, padding, dilation, groups, window, false));
}

std::tuple<Tensor, Tensor> conv_relu_pool_codes(const Tensor& input, const Tensor& weight, std::optional<Tensor> bias,
    Sizes stride, Sizes padding, Sizes dilation, int64_t groups, std::optional<std::string>, const Window& window) {
  return conv_pool(input, weight, bias, stride, padding, dilation, groups, window, true);
}

std::tuple<Tensor, Tensor> conv_relu_pool_backward(
    const Tensor& grad, const Tensor& codes, int64_t height, int64_t width, bool bias_grad, const Window& window) {
  const std::vector<int64_t> channels{bias_grad ? codes.size(1) : 0};
  Tensor bias = new_tensor(grad, channels, grad.scalar_type(), false);
  return {pool_backward(grad, codes, height, width, window, bias_grad ? &bias : nullptr), bias};
}

}  // namespace fastcnn::cpu
