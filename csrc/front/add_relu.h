#pragma once
// Addition and ReLU.

#include <ATen/ops/add.h>
#include <ATen/ops/relu.h>

#include "node.h"

namespace fastcnn::front {

struct AddReLU {
  static constexpr const char *STEM = "add_relu", *NODE = "AddReLUBackward";
  static constexpr Names NAMES{"add_relu", "add_relu", "add_relu_backward"};
  static constexpr bool MATERIALIZES = true, ANCHORED = false;

  static Tensor stock(const Plan&, const Tensors& tensors) {
    Tensor sum = at::add(tensors[0], tensors[1]);
    return at::relu_(sum);
  }

  static Tensor kernel(const PlanPtr& plan, const Tensors& tensors) {
    const auto run = [&] { return first(call(*plan->values, tensors[0], tensors[1])); };
    if (!needs_grad({&tensors[0], &tensors[1]})) {
      return run();
    }
    return record<AddReLU>(plan, {tensors[0], tensors[1]}, {}, true, [&] { return std::tuple(run(), Tensor()); });
  }

  static variable_list backward(const Asked& asked, const Tensor& grad) {
    const Tensor masked = first(call(*asked.plan.backward, grad, asked.saved[0]));
    return {asked.needs(0) ? masked : Tensor(), asked.needs(1) ? masked : Tensor()};
  }
};

}  // namespace fastcnn::front
