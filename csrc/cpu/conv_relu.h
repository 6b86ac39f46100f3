#pragma once
// The pass that conv_relu and linear_relu share.

#include "../tensors.h"

namespace fastcnn::cpu {

void relu_in_place(Tensor& y);

}  // namespace fastcnn::cpu
