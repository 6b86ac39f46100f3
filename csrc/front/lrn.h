#pragma once
// Local response normalization.

#include <ATen/ops/avg_pool2d.h>
#include <ATen/ops/avg_pool3d.h>
#include <ATen/ops/pad.h>

#include "node.h"

namespace fastcnn::front {

// As torch.nn.functional.local_response_norm composes it; the numbers are the window's size, then alpha, beta and k.
inline Tensor stock_lrn(const Plan& plan, const Tensor& input) {
  const int64_t size = plan.size, before = size / 2, after = (size - 1) / 2;
  Tensor squares = input.mul(input);
  if (input.dim() == 3) {
    squares = at::avg_pool2d(at::pad(squares.unsqueeze(1), {0, 0, before, after}), {size, 1}, 1).squeeze(1);
  } else {
    squares = squares.view({input.size(0), 1, input.size(1), input.size(2), -1});
    squares = at::avg_pool3d(at::pad(squares, {0, 0, 0, 0, before, after}), {size, 1, 1}, 1).squeeze(1);
    squares = squares.view(input.sizes());
  }
  const Tensor output = input / squares.mul(plan.constants[0]).add(plan.constants[2]).pow(plan.constants[1]);
  const bool narrow = input.scalar_type() == at::kHalf || input.scalar_type() == at::kBFloat16;
  return narrow ? output.to(input.scalar_type()) : output;
}

struct LRN {
  static constexpr const char *STEM = "lrn", *NODE = "LocalResponseNormBackward";
  static constexpr Names NAMES{"lrn", "lrn", "lrn_backward"};
  static constexpr bool MATERIALIZES = true, ANCHORED = false;

  static Tensor stock(const Plan& plan, const Tensors& tensors) { return stock_lrn(plan, tensors[0]); }

  static Tensor kernel(const PlanPtr& plan, const Tensors& tensors) {
    const Tensor& input = tensors[0];
    const auto& numbers = plan->constants;
    const auto run = [&] { return first(call(*plan->values, input, plan->size, numbers[0], numbers[1], numbers[2])); };
    return needs_grad({&input})
               ? record<LRN>(plan, {input}, {input}, false, [&] { return std::tuple(run(), Tensor()); })
               : run();
  }

  static variable_list backward(const Asked& asked, const Tensor& grad) {
    const Tensor& input = asked.saved[0];
    const auto& numbers = asked.plan.constants;
    return {first(call(*asked.plan.backward, grad, input, asked.plan.size, numbers[0], numbers[1], numbers[2]))};
  }
};

}  // namespace fastcnn::front
