#pragma once
// Linear layer, ReLU and torch's own dropout.

#include <ATen/ops/dropout.h>

#include "linear_relu.h"

namespace fastcnn::front {

struct LinearReLUDropout : LinearReLU {
  static constexpr const char* STEM = "linear_relu_dropout";

  static Tensor stock(const Plan& plan, const Tensors& tensors) { return drop(plan, LinearReLU::stock(plan, tensors)); }

  static Tensor kernel(const PlanPtr& plan, const Tensors& tensors) {
    return drop(*plan, LinearReLU::kernel(plan, tensors));
  }

 private:
  static Tensor drop(const Plan& plan, const Tensor& input) {
    return at::dropout(input, plan.constants[0], plan.training);
  }
};

}  // namespace fastcnn::front
