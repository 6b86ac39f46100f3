#pragma once
// Linear layer and ReLU.

#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/relu.h>

#include "conv_relu.h"

namespace fastcnn::front {

struct LinearReLU {
  static constexpr const char *STEM = "linear_relu", *NODE = "LinearReLUBackward";
  static constexpr Names NAMES{"linear_relu", "linear_relu", "linear_relu_backward"};
  static constexpr bool MATERIALIZES = true, ANCHORED = false;

  static Tensor stock(const Plan&, const Tensors& tensors) {
    Tensor output = at::linear(tensors[0], tensors[1], maybe(tensors[2]));
    return at::relu_(output);
  }

  static Tensor kernel(const PlanPtr& plan, const Tensors& tensors) {
    const Convolved all(*plan, tensors);
    const Tensor& input = all.input;
    if (input.dim() == 2) {
      return run(plan, input, all.weight, all.bias);
    }
    auto shape = input.sizes().vec();
    shape.back() = all.weight.size(0);
    return run(plan, input.dim() > 1 ? input.flatten(0, -2) : input.unsqueeze(0), all.weight, all.bias).view(shape);
  }

  static variable_list backward(const Asked& asked, const Tensor& grad) {
    const auto& saved = asked.saved;  // rows, weight, output
    auto [grad_linear, grad_bias] = both(call(*asked.plan.backward, grad, saved[2], asked.needs(2)));
    variable_list gradients(3);
    if (asked.needs(0)) {
      gradients[0] = at::mm(grad_linear, saved[1]);
    }
    if (asked.needs(1)) {
      gradients[1] = at::mm(grad_linear.t(), saved[0]);
    }
    if (asked.needs(2)) {
      gradients[2] = std::move(grad_bias);
    }
    return gradients;
  }

 private:
  static Tensor run(const PlanPtr& plan, const Tensor& rows, const Tensor& weight, Tensor bias) {
    if (bias.defined() && bias.sizes() != weight.sizes().slice(0, 1)) {
      bias = bias.expand(weight.size(0));
    }
    const auto forward = [&] { return first(call(*plan->values, rows, weight, maybe(bias))); };
    if (!needs_grad({&rows, &weight, &bias})) {
      return forward();
    }
    const Tensor kept_rows = weight.requires_grad() ? rows : Tensor(),
                 kept_weight = rows.requires_grad() ? weight : Tensor();
    return record<LinearReLU>(
        plan, {rows, weight, bias}, {kept_rows, kept_weight}, true, [&] { return std::tuple(forward(), Tensor()); });
  }
};

}  // namespace fastcnn::front
