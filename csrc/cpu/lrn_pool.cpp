// LRN + max-pool. With at least as many images as threads, a thread runs both for one image after another, and the
// normalized image stays in its cache; with fewer, the threads share each step, and the normalized images are a tensor.

#include <memory>

#include "../ops.h"
#include "each_image.h"
#include "lrn.h"
#include "max_pool.h"

namespace fastcnn::cpu {
namespace {

std::tuple<Tensor, Tensor> run_lrn_pool(const Tensor& input, const LRN& norm, const Window& window, bool codes) {
  STD_TORCH_CHECK(input.dim() == 4, "lrn_pool: expected (N, C, H, W), got ", input.dim(), " axes");
  STD_TORCH_CHECK(norm.size > 0, "lrn_pool: expected a positive size, got ", norm.size);
  const bool channels_last = is_channels_last(input);
  const Tensor x = dense(input, channels_last);
  const Layout shape = layout(x, channels_last);
  const Plane plane = make_plane(window, x.size(2), x.size(3));
  const std::vector<int64_t> sizes{shape.images, shape.channels, plane.out_height, plane.out_width};
  Tensor y = new_tensor(x, sizes, x.scalar_type(), channels_last);
  Tensor code = codes ? new_tensor(x, sizes, torch::headeronly::ScalarType::Byte, channels_last) : y;
  if (y.numel() == 0) {
    return {y, code};
  }
  const int64_t size = shape.channels * shape.pixels, pooled = y.numel() / shape.images;
  with_type("lrn_pool", x, [&](auto type) {
    using T = decltype(type);
    const T* from = data<T>(x);
    T* to = mutable_data<T>(y);
    uint8_t* places = codes ? mutable_data<uint8_t>(code) : nullptr;
    each_image(shape, [&](int64_t first, int64_t images) {
      const std::unique_ptr<T[]> normalized(new T[images * size]);
      const Layout part{images, shape.channels, shape.pixels, channels_last};
      lrn_into(from + first * size, normalized.get(), part, norm);
      uint8_t* their_places = places ? places + first * pooled : nullptr;
      pool_into<T>(normalized.get(), to + first * pooled, their_places, plane, part, window, false);
    });
  });
  return {y, code};
}

}  // namespace

Tensor lrn_pool(const Tensor& input, int64_t size, double alpha, double beta, double k, const Window& window) {
  return std::get<0>(run_lrn_pool(input, make_norm(size, alpha, beta, k, input.size(1)), window, false));
}

std::tuple<Tensor, Tensor> lrn_pool_codes(
    const Tensor& input, int64_t size, double alpha, double beta, double k, const Window& window) {
  return run_lrn_pool(input, make_norm(size, alpha, beta, k, input.size(1)), window, true);
}

Tensor lrn_pool_backward(const Tensor& grad, const Tensor& codes, const Tensor& input, int64_t size, double alpha,
    double beta, double k, const Window& window) {
  STD_TORCH_CHECK(input.dim() == 4 && grad.dim() == 4 && codes.dim() == 4, "lrn_pool_backward: expected (N, C, H, W)");
  STD_TORCH_CHECK(size > 0, "lrn_pool_backward: expected a positive size, got ", size);
  STD_TORCH_CHECK(grad.scalar_type() == input.scalar_type(), "lrn_pool_backward: gradient and input differ in dtype");
  const bool channels_last = is_channels_last(input);
  const Tensor x = dense(input, channels_last), from = dense(grad, channels_last), code = dense(codes, channels_last);
  const Layout shape = layout(x, channels_last);
  const Plane plane = make_plane(window, x.size(2), x.size(3));
  const int64_t image = shape.channels * shape.pixels, pooled = shape.channels * plane.out_height * plane.out_width;
  STD_TORCH_CHECK(from.numel() == shape.images * pooled && code.numel() == from.numel(),
      "lrn_pool_backward: gradient and codes do not fit the input");
  Tensor dx = new_tensor(x, x.sizes(), x.scalar_type(), channels_last);
  if (dx.numel() == 0) {
    return dx;
  }
  const LRN norm = make_norm(size, alpha, beta, k, input.size(1));
  with_type("lrn_pool_backward", x, [&](auto type) {
    using T = decltype(type);
    const T *values = data<T>(x), *gradient = data<T>(from);
    const uint8_t* places = data<uint8_t>(code);
    T* to = mutable_data<T>(dx);
    each_image(shape, [&](int64_t first, int64_t images) {
      const std::unique_ptr<T[]> unpooled(new T[images * image]);
      const Layout part{images, shape.channels, shape.pixels, channels_last};
      pool_backward_into<T>(
          gradient + first * pooled, places + first * pooled, unpooled.get(), nullptr, plane, part, window);
      lrn_backward_into<T>(values + first * image, unpooled.get(), to + first * image, part, norm);
    });
  });
  return dx;
}

}  // namespace fastcnn::cpu
