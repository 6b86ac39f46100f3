#pragma once
// Batch norm, ReLU and max-pool.

#include "bn_relu.h"
#include "max_pool.h"

namespace fastcnn::front {

struct BatchNormReLUPool {
  static constexpr const char *STEM = "bn_relu_pool", *NODE = "BatchNormReLUPoolBackward";
  static constexpr Names NAMES{"bn_relu_pool", "bn_relu_pool_codes", "bn_relu_pool_backward", "bn_relu_statistics"};
  static constexpr bool MATERIALIZES = false, ANCHORED = false;

  static Tensor stock(const Plan& plan, const Tensors& tensors) {
    return stock_pool(plan, stock_batch_norm(plan, tensors));
  }

  static Tensor kernel(const PlanPtr& plan, const Tensors& tensors) {
    const Tensor& input = tensors[0];
    const Norm norm(*plan, tensors);
    const auto run = [&](const OperatorHandle& op) {
      return call(op, input, norm.mean, norm.variance, maybe(norm.weight), maybe(norm.bias), plan->constants[1],
          plan->window_list);
    };
    if (!needs_grad({&input, &norm.weight, &norm.bias})) {
      return first(run(*plan->values));
    }
    return record<BatchNormReLUPool>(plan, {input, norm.mean, norm.variance, norm.weight, norm.bias},
        {input, norm.mean, norm.variance, norm.weight, norm.bias}, false, [&] { return both(run(*plan->recorded)); });
  }

  static variable_list backward(const Asked& asked, const Tensor& grad) {
    const auto& saved = asked.saved;  // input, mean, variance, weight, bias, codes
    const Plan& plan = asked.plan;
    const auto found = call(*plan.backward, grad, saved[5], saved[0], saved[1], saved[2], maybe(saved[3]),
        maybe(saved[4]), plan.constants[1], plan.training, plan.window_list);
    return norm_gradients(found, saved[3].defined(), saved[4].defined());
  }
};

}  // namespace fastcnn::front
