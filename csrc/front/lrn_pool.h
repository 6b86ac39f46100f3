#pragma once
// Local response normalization and max-pool.

#include "lrn.h"
#include "max_pool.h"

namespace fastcnn::front {

struct LRNPool {
  static constexpr const char *STEM = "lrn_pool", *NODE = "LRNPoolBackward";
  static constexpr Names NAMES{"lrn_pool", "lrn_pool_codes", "lrn_pool_backward"};
  static constexpr bool MATERIALIZES = false, ANCHORED = false;

  static Tensor stock(const Plan& plan, const Tensors& tensors) {
    return stock_pool(plan, stock_lrn(plan, tensors[0]));
  }

  static Tensor kernel(const PlanPtr& plan, const Tensors& tensors) {
    const Tensor& input = tensors[0];
    const auto run = [&](const OperatorHandle& op) {
      const auto& numbers = plan->constants;
      return call(op, input, plan->size, numbers[0], numbers[1], numbers[2], plan->window_list);
    };
    if (!needs_grad({&input})) {
      return first(run(*plan->values));
    }
    return record<LRNPool>(plan, {input}, {input}, false, [&] { return both(run(*plan->recorded)); });
  }

  static variable_list backward(const Asked& asked, const Tensor& grad) {
    const auto& saved = asked.saved;  // input, codes
    const Plan& plan = asked.plan;
    const auto& numbers = plan.constants;
    return {first(call(
        *plan.backward, grad, saved[1], saved[0], plan.size, numbers[0], numbers[1], numbers[2], plan.window_list))};
  }
};

}  // namespace fastcnn::front
