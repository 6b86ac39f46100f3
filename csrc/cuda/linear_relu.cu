// Linear + ReLU: torch's matrix product with bias and ReLU in its epilogue; the backward's pass is conv_relu's.

#include <array>

#include "../ops.h"
#include "conv_relu.h"

#ifdef __CUDACC__
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>
#else
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#endif

namespace fastcnn::cuda {
namespace {

// aten::_addmm_activation: relu(bias + input @ weight.t()). The dispatcher of the stable ABI cannot pass its scalars.
Tensor product_with_epilogue(const Tensor& input, const Tensor& weight, const Tensor& bias) {
#ifdef __CUDACC__
  const auto run = aoti_torch_cuda__addmm_activation;
#else
  const auto run = aoti_torch_cpu__addmm_activation;
#endif
  const Tensor transposed = torch::stable::transpose(weight, 0, 1);
  AtenTensorHandle output = nullptr;
  FASTCNN_TORCH_CHECK(run(bias.get(), input.get(), transposed.get(), 1.0, 1.0, false, &output));
  return Tensor(output);
}

Tensor product(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias) {
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(input), from(weight), from(bias)};
  FASTCNN_TORCH_CHECK(torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  return dense(torch::stable::detail::to<Tensor>(stack[0]), false);
}

}  // namespace

Tensor linear_relu(const Tensor& input, const Tensor& weight, std::optional<Tensor> bias) {
  if (bias && bias->dim() == 1 && bias->size(0) == weight.size(0)) {
    return product_with_epilogue(input, weight, *bias);
  }
  Tensor y = product(input, weight, bias);
  bias_relu_in_place(y, std::nullopt);
  return y;
}

}  // namespace fastcnn::cuda
