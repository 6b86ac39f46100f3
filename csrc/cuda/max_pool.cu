#include "../ops.h"
#include "max_pool.h"
namespace fastcnn::cuda {
std::pair<Tensor, Tensor> pool(const Tensor&, const std::optional<Tensor>&, const Window&, bool, bool) { STD_TORCH_CHECK(false, "pool"); }
std::pair<Tensor, Tensor> pool_backward(const Tensor&, const Tensor&, int64_t, int64_t, const Window&, bool) { STD_TORCH_CHECK(false, "pool_backward"); }
Tensor max_pool(const Tensor&, Sizes, Sizes, Sizes, Sizes, bool) {
  STD_TORCH_CHECK(false, "max_pool");
}

std::tuple<Tensor, Tensor> max_pool_codes(
    const Tensor&, Sizes, Sizes, Sizes, Sizes, bool) {
  STD_TORCH_CHECK(false, "max_pool_codes");
}

Tensor max_pool_backward(
    const Tensor&, const Tensor&, int64_t, int64_t, Sizes, Sizes, Sizes,
    Sizes, bool) {
  STD_TORCH_CHECK(false, "max_pool_backward");
}
}  // namespace fastcnn::cuda
