#include "../ops.h"
namespace fastcnn::cuda {
Tensor lrn_pool(
    const Tensor&, int64_t, double, double, double, Sizes, Sizes,
    Sizes, Sizes, bool) {
  STD_TORCH_CHECK(false, "lrn_pool");
}

std::tuple<Tensor, Tensor> lrn_pool_codes(
    const Tensor&, int64_t, double, double, double, Sizes, Sizes,
    Sizes, Sizes, bool) {
  STD_TORCH_CHECK(false, "lrn_pool_codes");
}

Tensor lrn_pool_backward(
    const Tensor&, const Tensor&, const Tensor&, int64_t, double, double, double,
    Sizes, Sizes, Sizes, Sizes, bool) {
  STD_TORCH_CHECK(false, "lrn_pool_backward");
}
}  // namespace fastcnn::cuda
