#pragma once
// The pass that the stages without a pool share.

#include <optional>

#include "../tensors.h"

namespace fastcnn::cuda {

// Add bias (C,) to a dense (N, C, *) and apply ReLU, in place.
void bias_relu_in_place(Tensor& y, const std::optional<Tensor>& bias);

}  // namespace fastcnn::cuda
