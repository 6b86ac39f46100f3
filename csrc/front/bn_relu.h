#pragma once
// Batch norm and ReLU.

#include <ATen/ops/batch_norm.h>
#include <ATen/ops/lerp.h>
#include <ATen/ops/relu.h>

#include "node.h"

namespace fastcnn::front {

// A batch norm's tensors come as input, running mean, running variance, weight and bias; its numbers as momentum, eps.
inline Tensor stock_batch_norm(const Plan& plan, const Tensors& tensors) {
  Tensor output = at::batch_norm(tensors[0], maybe(tensors[3]), maybe(tensors[4]), maybe(tensors[1]), maybe(tensors[2]),
      plan.training, plan.constants[0], plan.constants[1], at::globalContext().userEnabledCuDNN());
  return at::relu_(output);
}

// The channels' numbers as kernels take them.
struct Norm {
  Tensor mean, variance, weight, bias;

  Norm(const Plan& plan, const Tensors& tensors) : weight(wide(tensors[3])), bias(wide(tensors[4])) {
    if (!plan.training) {
      mean = wide(tensors[1]);
      variance = wide(tensors[2]);
      return;
    }
    Tensor unbiased;
    {
      const Below below;
      const Tensor statistics = first(call(*plan.statistics, tensors[0]));
      mean = statistics.select(0, 0);
      variance = statistics.select(0, 1);
      unbiased = statistics.select(0, 2);
    }
    const at::AutoGradMode constant(false);
    const at::AutoDispatchBelowAutograd below;  // but in-place changes are counted
    update(tensors[1], mean, plan.constants[0]);
    update(tensors[2], unbiased, plan.constants[0]);
  }

 private:
  static Tensor wide(const Tensor& each) {
    return each.defined() && each.scalar_type() != at::kFloat ? each.to(at::kFloat) : each;
  }

  static void update(const Tensor& running, const Tensor& batch, double momentum) {
    if (!running.defined()) {
      return;
    }
    if (running.scalar_type() == at::kFloat) {
      running.lerp_(batch, momentum);
    } else {
      running.copy_(at::lerp(running.to(at::kFloat), batch, momentum));
    }
  }
};

// The gradients of input, weight and bias, in the places of the Function's inputs.
inline variable_list norm_gradients(const std::vector<IValue>& found, bool has_weight, bool has_bias) {
  variable_list gradients(5);
  gradients[0] = found[0].toTensor();
  gradients[3] = has_weight ? found[1].toTensor() : Tensor();
  gradients[4] = has_bias ? found[2].toTensor() : Tensor();
  return gradients;
}

struct BatchNormReLU {
  static constexpr const char *STEM = "bn_relu", *NODE = "BatchNormReLUBackward";
  static constexpr Names NAMES{"bn_relu", "bn_relu", "bn_relu_backward", "bn_relu_statistics"};
  static constexpr bool MATERIALIZES = true, ANCHORED = false;

  static Tensor stock(const Plan& plan, const Tensors& tensors) { return stock_batch_norm(plan, tensors); }

  static Tensor kernel(const PlanPtr& plan, const Tensors& tensors) {
    const Tensor& input = tensors[0];
    const Norm norm(*plan, tensors);
    const auto run = [&] {
      return first(call(
          *plan->values, input, norm.mean, norm.variance, maybe(norm.weight), maybe(norm.bias), plan->constants[1]));
    };
    if (!needs_grad({&input, &norm.weight, &norm.bias})) {
      return run();
    }
    return record<BatchNormReLU>(plan, {input, norm.mean, norm.variance, norm.weight, norm.bias},
        {input, norm.mean, norm.variance, norm.weight, norm.bias}, false, [&] { return std::tuple(run(), Tensor()); });
  }

  static variable_list backward(const Asked& asked, const Tensor& grad) {
    const auto& saved = asked.saved;  // input, mean, variance, weight, bias
    const Plan& plan = asked.plan;
    const auto found = call(*plan.backward, grad, saved[0], saved[1], saved[2], maybe(saved[3]), maybe(saved[4]),
        plan.constants[1], plan.training);
    return norm_gradients(found, saved[3].defined(), saved[4].defined());
  }
};

}  // namespace fastcnn::front
