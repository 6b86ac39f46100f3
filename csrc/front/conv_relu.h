#pragma once
// Convolution and ReLU.

#include <ATen/ops/conv2d.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/relu.h>
#include <ATen/record_function.h>

#include <array>

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

// Run a kernel that convolves. torch's profiler counts FLOPs by the names of torch's own functions: it is told of a
// conv2d around a kernel, unless the kernel's operator calls torch's (Triton's epilogue).
template <class Run>
auto told_to_profilers(const Plan& plan, const Convolved& all, const Tensor& input, const Run& run) {
  at::RecordFunction guard(at::RecordScope::FUNCTION);
  const bool epilogue = !plan.algorithm.isString() || plan.algorithm.toStringRef().rfind("epilogue", 0) == 0;
  if (guard.isActive() && !(epilogue && plan.values->operator_name().overload_name == "triton")) {
    const std::array<c10::IValue, 7> inputs{
        input, all.weight, maybe(all.bias), plan.stride(), plan.pads(), plan.dilation(), plan.groups()};
    guard.before("aten::conv2d", c10::ArrayRef<const c10::IValue>(inputs.data(), inputs.size()));
  }
  return run();
}

// The gradients of input, weight and bias from that of the convolution's output.
inline variable_list convolution_gradients(
    const Asked& asked, const Tensor& grad, const Tensor& input, const Tensor& weight, const Tensor& grad_bias) {
  variable_list gradients(3);
  const Plan& plan = asked.plan;
  if (asked.needs(0) || asked.needs(1)) {
    auto [grad_input, grad_weight, none] =
        at::convolution_backward(grad, input, weight, at::OptionalIntArrayRef(), plan.stride(), plan.pads(),
            plan.dilation(), false, {0, 0}, plan.groups(), {asked.needs(0), asked.needs(1), false});
    gradients[0] = std::move(grad_input);
    gradients[1] = std::move(grad_weight);
  }
  if (asked.needs(2)) {
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
        return told_to_profilers(*plan, all, input, [&] {
          return first(
              call(*plan->values, input, all.weight, maybe(all.bias), plan->convolution_list, plan->algorithm));
        });
      };
      if (!all.needs_grad()) {
        return run();
      }
      return record<ConvReLU>(
          plan, {input, all.weight, all.bias}, {input, all.weight}, true, [&] { return std::tuple(run(), Tensor()); });
    });
  }

  // What the stage that follows reads and sets (stage_before in fastcnn/ops/gradients.py).
  static PyGetSetDef* properties() {
    using namespace torch::autograd;  // for the names in the macro
    static PyGetSetDef all[] = {{"masked", get_masked, set_masked, nullptr, nullptr},
        {"bias_sum", nullptr, set_bias_sum, nullptr, nullptr},
        {"needs_input_grad", get_needs, nullptr, nullptr, nullptr}, THP_FUNCTION_DEFAULT_PROPERTIES,
        {nullptr, nullptr, nullptr, nullptr, nullptr}};
    return all;
  }

  static variable_list backward(const Asked& asked, const Tensor& grad) {
    const auto& saved = asked.saved;  // input, weight, output
    if (asked.masked) {
      return convolution_gradients(asked, grad, saved[0], saved[1], asked.bias_sum);
    }
    auto [grad_conv, grad_bias] = both(call(*asked.plan.backward, grad, saved[2], asked.needs(2)));
    return convolution_gradients(asked, grad_conv, saved[0], saved[1], grad_bias);
  }

 private:
  static Node& node_of(PyObject* self) {
    return static_cast<Node&>(*reinterpret_cast<torch::autograd::THPCppFunction*>(self)->cdata);
  }

  static PyObject* get_masked(PyObject* self, void*) { return PyBool_FromLong(node_of(self).masked); }

  static int set_masked(PyObject* self, PyObject* value, void*) {
    node_of(self).masked = value == Py_True;
    return 0;
  }

  static int set_bias_sum(PyObject* self, PyObject* value, void*) {
    node_of(self).bias_sum = value && THPVariable_Check(value) ? THPVariable_Unpack(value) : Tensor();
    return 0;
  }

  static PyObject* get_needs(PyObject* self, void*) {
    const Node& node = node_of(self);
    PyObject* needs = PyTuple_New(node.num_outputs());
    for (size_t i = 0; needs && i < node.num_outputs(); ++i) {
      PyTuple_SET_ITEM(needs, i, PyBool_FromLong(node.should_compute_output(i)));
    }
    return needs;
  }
};

}  // namespace fastcnn::front
