// Linear + ReLU: torch's matrix product, then ReLU in place; the backward's pass is conv_relu's.

#include <array>

#include "../ops.h"
#include "conv_relu.h"

namespace fastcnn::cpu {

Tensor linear_relu(const Tensor& input, const Tensor& weight, std::optional<Tensor> bias) {
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(input), from(weight), from(bias)};
  FASTCNN_TORCH_CHECK(torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  Tensor y = dense(torch::stable::detail::to<Tensor>(stack[0]), false);
  relu_in_place(y);
  return y;
}

}  // namespace fastcnn::cpu
