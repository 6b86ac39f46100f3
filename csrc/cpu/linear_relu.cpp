// Linear + ReLU: torch's matrix product, then ReLU in place; the backward's pass is conv_relu's.

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <array>

#include "../ops.h"
#include "conv_relu.h"

namespace fastcnn::cpu {

Tensor linear_relu(const Tensor& input, const Tensor& weight, std::optional<Tensor> bias) {
  STD_TORCH_CHECK(
      input.dim() == 2 && weight.dim() == 2, "linear_relu: expected (N, features) and a weight of two axes");
  const std::array<int64_t, 2> sizes{weight.size(1), weight.size(0)}, strides{weight.stride(1), weight.stride(0)};
  const std::vector<int64_t> rows{input.size(0), weight.size(0)};
  AtenTensorHandle turned = nullptr;
  FASTCNN_TORCH_CHECK(aoti_torch__reinterpret_tensor(weight.get(), 2, sizes.data(), strides.data(), 0, &turned));
  const Tensor matrix(turned);
  Tensor y = new_tensor(input, rows, input.scalar_type(), false);
  if (bias) {
    FASTCNN_TORCH_CHECK(aoti_torch_cpu_addmm_out(y.get(), bias->get(), input.get(), matrix.get(), 1, 1));
  } else {
    FASTCNN_TORCH_CHECK(aoti_torch_cpu_mm_out(y.get(), input.get(), matrix.get()));
  }
  relu_in_place(y);
  return y;
}

}  // namespace fastcnn::cpu
