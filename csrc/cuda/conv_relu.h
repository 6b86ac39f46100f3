#pragma once
// What the stages that begin with a convolution or a matrix product share.

#include <optional>

#include "../tensors.h"

namespace fastcnn::cuda {

// The bias (C,) of a dense (N, C, *), as kernels read it.
inline std::optional<Tensor> dense_bias(const std::optional<Tensor>& bias, const Tensor& y) {
  if (!bias) {
    return std::nullopt;
  }
  STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == y.size(1) && bias->scalar_type() == y.scalar_type(),
      "fastcnn: expected a bias of ", y.size(1), " elements in the input's dtype");
  return torch::stable::contiguous(*bias);
}

// Add bias (C,) to a dense (N, C, *) and apply ReLU, in place.
void bias_relu_in_place(Tensor& y, const std::optional<Tensor>& bias);

}  // namespace fastcnn::cuda
