#include "../ops.h"
namespace fastcnn::cuda {
Tensor conv_relu_pool(
    const Tensor&, const Tensor&, std::optional<Tensor>, Sizes, Sizes, Sizes,
    int64_t, std::optional<std::string>, Sizes, Sizes, Sizes,
    Sizes, bool) {
  STD_TORCH_CHECK(false, "conv_relu_pool");
}

std::tuple<Tensor, Tensor> conv_relu_pool_codes(
    const Tensor&, const Tensor&, std::optional<Tensor>, Sizes, Sizes, Sizes,
    int64_t, std::optional<std::string>, Sizes, Sizes, Sizes,
    Sizes, bool) {
  STD_TORCH_CHECK(false, "conv_relu_pool_codes");
}

std::tuple<Tensor, Tensor> conv_relu_pool_backward(
    const Tensor&, const Tensor&, int64_t, int64_t, bool, Sizes, Sizes,
    Sizes, Sizes, bool) {
  STD_TORCH_CHECK(false, "conv_relu_pool_backward");
}
}  // namespace fastcnn::cuda
