#pragma once
// Max-pool.

#include <ATen/ops/max_pool2d.h>
#include <ATen/ops/max_pool2d_with_indices.h>

#include "node.h"

namespace fastcnn::front {

inline Tensor stock_pool(const Plan& plan, const Tensor& input) {
  const at::IntArrayRef window = plan.window;
  return at::max_pool2d(
      input, window.slice(0, 2), window.slice(2, 2), window.slice(4, 2), window.slice(6, 2), window[8] != 0);
}

struct MaxPool {
  static constexpr const char *STEM = "max_pool", *NODE = "MaxPoolBackward";
  static constexpr Names NAMES{"max_pool", "max_pool_codes", "max_pool_backward"};
  static constexpr bool MATERIALIZES = false, ANCHORED = true;

  static Tensor stock(const Plan& plan, const Tensors& tensors) { return stock_pool(plan, tensors[0]); }

  static std::tuple<Tensor, Tensor> stock_with_indices(const Plan& plan, const Tensors& tensors) {
    const at::IntArrayRef window = plan.window;
    return at::max_pool2d_with_indices(
        tensors[0], window.slice(0, 2), window.slice(2, 2), window.slice(4, 2), window.slice(6, 2), window[8] != 0);
  }

  static Tensor kernel(const PlanPtr& plan, const Tensors& tensors) {
    return with_batch(*plan, tensors[0], [&](const Tensor& input) {
      if (!needs_grad({&input})) {
        return first(call(*plan->values, input, plan->window_list));
      }
      return record<MaxPool>(
          plan, {input}, {}, false, [&] { return both(call(*plan->recorded, input, plan->window_list)); });
    });
  }

  static variable_list backward(const Asked& asked, const Tensor& grad) {
    const Tensor& codes = asked.saved[0];
    const Plan& plan = asked.plan;
    return {first(call(*plan.backward, grad, codes, plan.height, plan.width, plan.window_list))};
  }
};

}  // namespace fastcnn::front
