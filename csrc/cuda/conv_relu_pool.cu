// Convolution + bias + ReLU + max-pool: one pass over torch's bias-free convolution, or a kernel of ours that pools in
// its epilogue if it can, and is followed by a pass over its output if not.

#include "../convolution.h"
#include "../ops.h"
#include "convolution.h"
#include "max_pool.h"

namespace fastcnn::cuda {
namespace {

// The rows and columns of the convolution's output, before and after the pool.
Plane pooled_plane(const Convolution& convolution, const Window& pool) {
  const Plane plane = make_plane(convolution.window, convolution.input.size(2), convolution.input.size(3));
  return make_plane(pool, plane.out_height, plane.out_width);
}

std::pair<Tensor, Tensor> conv_pool(
    const Convolution& given, const std::string& algorithm, const Window& window, bool codes) {
  const auto run = algorithm == "direct" ? direct : implicit_gemm;
  if (fits_epilogue(window, pooled_plane(given, window))) {
    return run(given, codes ? Fused::RELU_POOL_CODES : Fused::RELU_POOL);
  }
  return pool(run(given, Fused::RELU).first, std::nullopt, window, true, codes);
}

std::pair<Tensor, Tensor> conv_pool(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
    Sizes stride, Sizes padding, Sizes dilation, int64_t groups, const std::optional<std::string>& algorithm,
    const Window& window, bool codes) {
  if (algorithm == "implicit_gemm" || algorithm == "direct") {
    const Convolution given = make_convolution(input, weight, bias, stride, padding, dilation, groups);
    return conv_pool(given, *algorithm, window, codes);
  }
  const Tensor y = convolution(input, weight, std::nullopt, stride, padding, dilation, groups);
  return pool(y, bias, window, true, codes);
}

}  // namespace

Tensor conv_relu_pool(const Tensor& input, const Tensor& weight, std::optional<Tensor> bias, Sizes stride,
    Sizes padding, Sizes dilation, int64_t groups, std::optional<std::string> algorithm, const Window& window) {
  return conv_pool(input, weight, bias, stride, padding, dilation, groups, algorithm, window, false).first;
}

std::tuple<Tensor, Tensor> conv_relu_pool_codes(const Tensor& input, const Tensor& weight, std::optional<Tensor> bias,
    Sizes stride, Sizes padding, Sizes dilation, int64_t groups, std::optional<std::string> algorithm,
    const Window& window) {
  return conv_pool(input, weight, bias, stride, padding, dilation, groups, algorithm, window, true);
}

std::tuple<Tensor, Tensor> conv_relu_pool_backward(
    const Tensor& grad, const Tensor& codes, int64_t height, int64_t width, bool bias_grad, const Window& window) {
  return pool_backward(grad, codes, height, width, window, bias_grad);
}

}  // namespace fastcnn::cuda
