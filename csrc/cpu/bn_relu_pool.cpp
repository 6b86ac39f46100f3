// Batch norm + ReLU + max-pool. The values between norm and pool are one image, or one plane, in a thread's cache.

#include <memory>

#include "../ops.h"
#include "bn_relu.h"
#include "each_image.h"
#include "max_pool.h"

namespace fastcnn::cpu {
namespace {

constexpr int64_t LARGE_PLANE = 4096;  // pixels from which a plane is worth a step of its own

std::pair<Tensor, Tensor> norm_pool(const Tensor& input, const Norm& norm, const Window& window, bool codes) {
  STD_TORCH_CHECK(input.dim() == 4, "bn_relu_pool: expected (N, C, H, W), got ", input.dim(), " axes");
  const Numbers numbers(norm);
  const bool channels_last = is_channels_last(input);
  const Tensor x = dense(input, channels_last);
  const Plane plane = make_plane(window, x.size(2), x.size(3));
  const std::vector<int64_t> sizes{x.size(0), x.size(1), plane.out_height, plane.out_width};
  Tensor y = new_tensor(x, sizes, x.scalar_type(), channels_last);
  Tensor code = codes ? new_tensor(x, sizes, torch::headeronly::ScalarType::Byte, channels_last) : y;
  Layout shape = layout(x, channels_last);
  if (!channels_last && shape.pixels >= LARGE_PLANE) {
    shape = {shape.images * shape.channels, 1, shape.pixels, false};
  }
  if (y.numel() == 0) {
    return {y, code};
  }
  const int64_t size = shape.channels * shape.pixels, pooled = y.numel() / shape.images;
  with_type("bn_relu_pool", x, [&](auto type) {
    using T = decltype(type);
    const T* from = data<T>(x);
    T* to = mutable_data<T>(y);
    uint8_t* places = codes ? mutable_data<uint8_t>(code) : nullptr;
    each_image(shape, [&](int64_t first, int64_t images) {
      const std::unique_ptr<T[]> normalized(new T[images * size]);
      const Layout part{images, shape.channels, shape.pixels, channels_last};
      normalize_into<T>(from + first * size, normalized.get(), part, first * shape.channels, numbers, false);
      uint8_t* their_places = places ? places + first * pooled : nullptr;
      pool_into<T>(normalized.get(), to + first * pooled, their_places, plane, part, window, true);
    });
  });
  return {y, code};
}

}  // namespace

Tensor bn_relu_pool(const Tensor& input, const Tensor& mean, const Tensor& variance, std::optional<Tensor> weight,
    std::optional<Tensor> bias, double eps, const Window& window) {
  return norm_pool(input, make_norm(input, mean, variance, weight, bias, eps), window, false).first;
}

std::tuple<Tensor, Tensor> bn_relu_pool_codes(const Tensor& input, const Tensor& mean, const Tensor& variance,
    std::optional<Tensor> weight, std::optional<Tensor> bias, double eps, const Window& window) {
  return norm_pool(input, make_norm(input, mean, variance, weight, bias, eps), window, true);
}

std::tuple<Tensor, Tensor, Tensor> bn_relu_pool_backward(const Tensor& grad, const Tensor& codes, const Tensor& input,
    const Tensor& mean, const Tensor& variance, std::optional<Tensor> weight, std::optional<Tensor> bias, double eps,
    bool training, const Window& window) {
  STD_TORCH_CHECK(input.dim() == 4 && grad.scalar_type() == input.scalar_type() && codes.dim() == 4 &&
                      codes.size(0) == input.size(0) && codes.size(1) == input.size(1),
      "bn_relu_pool_backward: gradient and codes do not fit the input");
  const Numbers numbers(make_norm(input, mean, variance, weight, bias, eps));
  const bool channels_last = is_channels_last(input);
  const Tensor x = dense(input, channels_last);
  const Tensor unpooled = pool_backward(grad, dense(codes, channels_last), x.size(2), x.size(3), window, nullptr);
  const Tensor flow = dense(unpooled, channels_last);
  return normalize_backward(flow, x, flow, numbers, training, true);
}

}  // namespace fastcnn::cpu
