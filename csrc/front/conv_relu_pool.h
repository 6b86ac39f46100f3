#pragma once
// Convolution, ReLU and max-pool.

#include "conv_relu.h"
#include "max_pool.h"

namespace fastcnn::front {

struct ConvReLUPool {
  static constexpr const char *STEM = "conv_relu_pool", *NODE = "ConvReLUPoolBackward";
  static constexpr Names NAMES{"conv_relu_pool", "conv_relu_pool_codes", "conv_relu_pool_backward"};
  static constexpr bool MATERIALIZES = false, ANCHORED = true;

  static Tensor stock(const Plan& plan, const Tensors& tensors) {
    return stock_pool(plan, stock_convolution(plan, tensors));
  }

  static Tensor kernel(const PlanPtr& plan, const Tensors& tensors) {
    const Convolved all(*plan, tensors);
    return with_batch(*plan, all.input, [&](const Tensor& input) {
      const auto run = [&](const OperatorHandle& op) {
        return told_to_profilers(*plan, all, input, [&] {
          return call(
              op, input, all.weight, maybe(all.bias), plan->convolution_list, plan->algorithm, plan->window_list);
        });
      };
      if (!all.needs_grad()) {
        return first(run(*plan->values));
      }
      return record<ConvReLUPool>(
          plan, {input, all.weight, all.bias}, {input, all.weight}, false, [&] { return both(run(*plan->recorded)); });
    });
  }

  static variable_list backward(const Asked& asked, const Tensor& grad) {
    const auto& saved = asked.saved;  // input, weight, codes
    const Plan& plan = asked.plan;
    auto [grad_conv, grad_bias] =
        both(call(*plan.backward, grad, saved[2], plan.height, plan.width, asked.needs(2), plan.window_list));
    return convolution_gradients(asked, grad_conv, saved[0], saved[1], grad_bias);
  }
};

}  // namespace fastcnn::front
