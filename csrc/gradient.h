#pragma once
// What conv_relu_backward and linear_relu_backward ask of their arguments, on every backend.

#include "tensors.h"

namespace fastcnn {

inline void check_gradient(const Tensor& grad, const Tensor& output) {
  STD_TORCH_CHECK(grad.dim() == output.dim() && grad.scalar_type() == output.scalar_type(),
      "conv_relu_backward: gradient and output differ in rank or dtype");
  for (int64_t axis = 0; axis < output.dim(); ++axis) {
    STD_TORCH_CHECK(grad.size(axis) == output.size(axis), "conv_relu_backward: gradient and output differ in shape");
  }
}

}  // namespace fastcnn
