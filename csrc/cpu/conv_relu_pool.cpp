// Convolution + ReLU + max-pool: torch's convolution, then one pass to pooled values and codes.

#include "../ops.h"
#include "convolution.h"
#include "max_pool.h"

namespace fastcnn::cpu {
namespace {

std::tuple<Tensor, Tensor> conv_pool(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
    Sizes stride, Sizes padding, Sizes dilation, int64_t groups, const Window& window, bool codes) {
  return pool(convolution(input, weight, bias, stride, padding, dilation, groups), window, true, codes);
}

}  // namespace

Tensor conv_relu_pool(const Tensor& input, const Tensor& weight, std::optional<Tensor> bias, Sizes stride,
    Sizes padding, Sizes dilation, int64_t groups, std::optional<std::string>, Sizes pool_size, Sizes pool_stride,
    Sizes pool_padding, Sizes pool_dilation, bool pool_ceil_mode) {
  const Window window = make_window(pool_size, pool_stride, pool_padding, pool_dilation, pool_ceil_mode);
  return std::get<0>(conv_pool(input, weight, bias, stride, padding, dilation, groups, window, false));
}

std::tuple<Tensor, Tensor> conv_relu_pool_codes(const Tensor& input, const Tensor& weight, std::optional<Tensor> bias,
    Sizes stride, Sizes padding, Sizes dilation, int64_t groups, std::optional<std::string>, Sizes pool_size,
    Sizes pool_stride, Sizes pool_padding, Sizes pool_dilation, bool pool_ceil_mode) {
  const Window window = make_window(pool_size, pool_stride, pool_padding, pool_dilation, pool_ceil_mode);
  return conv_pool(input, weight, bias, stride, padding, dilation, groups, window, true);
}

std::tuple<Tensor, Tensor> conv_relu_pool_backward(const Tensor& grad, const Tensor& codes, int64_t height,
    int64_t width, bool bias_grad, Sizes size, Sizes stride, Sizes padding, Sizes dilation, bool ceil_mode) {
  const Window window = make_window(size, stride, padding, dilation, ceil_mode);
  return pool_backward(grad, codes, height, width, window, bias_grad);
}

}  // namespace fastcnn::cpu
