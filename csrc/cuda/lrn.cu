#include "../ops.h"
namespace fastcnn::cuda {
Tensor lrn(const Tensor&, int64_t, double, double, double) {
  STD_TORCH_CHECK(false, "lrn");
}

Tensor lrn_backward(const Tensor&, const Tensor&, int64_t, double, double, double) {
  STD_TORCH_CHECK(false, "lrn_backward");
}
}  // namespace fastcnn::cuda
