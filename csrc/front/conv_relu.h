#pragma once
// Convolution and ReLU.

#include <ATen/ops/conv2d.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/relu.h>

#include "node.h"

namespace fastcnn::front {

// A convolution's tensors, in autocast's dtype where that is on.
struct Convolved {
  Tensor input, weight, bias;

  Convolved(const Plan& plan, const Tensors& tensors) : input(tensors[0]), weight(tensors[1]), bias(tensors[2]) {
    if (plan.cast) {
      for (Tensor* each : {&input, &weight, &bias}) {
        *each = each->defined() ? each->to(*plan.cast) : *each;
      }
    }
  }

  bool needs_grad() const { return front::needs_grad({&input, &weight, &bias}); }
};

inline Tensor stock_convolution(const Plan& plan, const Tensors& tensors) {
  const Maybe bias = maybe(tensors[2]);
  const Tensor output =
      plan.padding.empty()
          ? at::conv2d(tensors[0], tensors[1], bias, plan.stride(), plan.pads(), plan.dilation(), plan.groups())
          : at::conv2d(tensors[0], tensors[1], bias, plan.stride(), plan.padding, plan.dilation(), plan.groups());
  return at::relu_(const_cast<Tensor&>(output));
}

// The gradients of input, weight and bias from that of the convolution's output.
inline variable_list convolution_gradients(
    Node& node, const Tensor& grad, const Tensor& input, const Tensor& weight, const Tensor& grad_bias) {
  variable_list gradients(3);
  const Plan& plan = *node.plan;
  if (node.needs(0) || node.needs(1)) {
    auto [grad_input, grad_weight, none] =
        at::convolution_backward(grad, input, weight, at::OptionalIntArrayRef(), plan.stride(), plan.pads(),
            plan.dilation(), false, {0, 0}, plan.groups(), {node.needs(0), node.needs(1), false});
    gradients[0] = std::move(grad_input);
    gradients[1] = std::move(grad_weight);
  }
  if (node.needs(2)) {
    gradients[2] = grad_bias;
  }
  return gradients;
}

struct ConvReLU {
  static constexpr const char *STEM = "conv_relu", *NODE = "ConvReLUBackward";
  static constexpr Names NAMES{"conv_relu", "conv_relu", "conv_relu_backward"};
  static constexpr bool MATERIALIZES = true, ANCHORED = false;

  static Tensor stock(const Plan& plan, const Tensors& tensors) { return stock_convolution(plan, tensors); }

  static Tensor kernel(const PlanPtr& plan, const Tensors& tensors) {
    const Convolved all(*plan, tensors);
    return with_batch(*plan, all.input, [&](const Tensor& input) {
      const auto run = [&] {
        return first(call(*plan->values, input, all.weight, maybe(all.bias), plan->convolution_list, plan->algorithm));
      };
      if (!all.needs_grad()) {
        return run();
      }
      return record<ConvReLU>(
          plan, {input, all.weight, all.bias}, {input, all.weight}, true, [&] { return std::tuple(run(), Tensor()); });
    });
  }

  static variable_list backward(Node& node, const Tensor& grad) {
    const auto saved = node.unpack();  // input, weight, output
    auto [grad_conv, grad_bias] = both(call(*node.plan->backward, grad, saved[2], node.needs(2)));
    return convolution_gradients(node, grad_conv, saved[0], saved[1], grad_bias);
  }
};

}  // namespace fastcnn::front
