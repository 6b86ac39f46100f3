#pragma once
// The autograd nodes of the ops' kernels.

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/python_cpp_function.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>

#include "plan.h"

namespace fastcnn::front {

using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

inline Maybe maybe(const Tensor& tensor) { return tensor.defined() ? Maybe(tensor) : std::nullopt; }

// Kernels run below autograd, as in the forward of a torch.autograd.Function.
struct Below {
  at::AutoGradMode mode{false};
  at::AutoDispatchBelowADInplaceOrView below;
};

// What a backward is asked for: the gradients of some inputs, from what was saved of a call.
struct Asked {
  const Plan& plan;
  at::ArrayRef<Tensor> saved;
  uint64_t wanted;      // a bit for each input
  bool masked = false;  // by the stage that follows, which has summed the bias' gradient, too
  Tensor bias_sum = {};

  bool needs(size_t input) const { return wanted >> input & 1; }
};

// What the nodes of all ops share. A backward that must itself be differentiable is Python's, in stock operations.
struct Node : torch::autograd::Node {
  PlanPtr plan;
  std::vector<SavedVariable> saved;
  bool masked = false;  // see fastcnn/ops/gradients.py: a stage that follows sets these from Python
  Tensor bias_sum;

  uint64_t wanted() const {
    uint64_t inputs = 0;
    for (size_t i = 0; i < num_outputs(); ++i) {
      inputs |= uint64_t(task_should_compute_output(i)) << i;
    }
    return inputs;
  }

  c10::SmallVector<Tensor, 6> unpack() {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto self = getptr();
    c10::SmallVector<Tensor, 6> tensors;
    for (const auto& each : saved) {
      tensors.push_back(each.unpack(self));
    }
    return tensors;
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    bias_sum.reset();
    for (auto& each : saved) {
      each.reset_data();
    }
  }

  // In stock a differentiable backward depends on the layers' outputs, through masks and winners. Here it depends on
  // the anchor: an output without elements, made when it is first needed.
  Tensor anchor() {
    const auto& output = input_metadata(0);
    const Tensor made = at::empty({output.shape_as_dim_vector()[0].expect_int(), 0}, output.options());
    const std::lock_guard<std::mutex> lock(mutex_);
    if (num_inputs() == 1) {
      add_input_metadata(made);
    }
    torch::autograd::impl::set_gradient_edge(made, {getptr(), 1});
    return made;
  }

  variable_list derive(const Tensor& grad, bool anchored) {
    auto tensors = unpack();
    if (anchored) {
      tensors.push_back(anchor());
    }
    const pybind11::gil_scoped_acquire gil;
    auto held = checked(PyTuple_New(Py_ssize_t(tensors.size())));
    for (size_t i = 0; i < tensors.size(); ++i) {
      PyTuple_SET_ITEM(held.get(), i, checked(THPVariable_Wrap(tensors[i])).release());
    }
    auto needs = checked(PyTuple_New(num_outputs()));
    for (size_t i = 0; i < num_outputs(); ++i) {
      PyTuple_SET_ITEM(needs.get(), i, PyBool_FromLong(task_should_compute_output(i)));
    }
    auto given = checked(THPVariable_Wrap(grad));
    PyObject* arguments[] = {held.get(), needs.get(), given.get()};
    auto found = checked(PyObject_Vectorcall(plan->derive->ptr(getPyInterpreter()), arguments, 3, nullptr));
    variable_list gradients(num_outputs());
    for (size_t i = 0; i < num_outputs(); ++i) {
      PyObject* each = PyTuple_GetItem(found.get(), Py_ssize_t(i));
      if (!each) {
        throw python_error();
      }
      if (each != Py_None) {
        gradients[i] = THPVariable_Unpack(each);
      }
    }
    return gradients;
  }

 private:
  static THPObjectPtr checked(PyObject* object) {
    if (!object) {
      throw python_error();
    }
    return THPObjectPtr(object);
  }
};

template <class Op>
struct NodeOf final : Node {
  std::string name() const override { return Op::NODE; }

  variable_list apply(variable_list&& grads) override {
    Tensor grad = std::move(grads[0]);
    if (!grad.defined()) {
      const bool only_anchor = grads.size() > 1 && grads[1].defined();
      if (!Op::MATERIALIZES && !only_anchor) {
        return variable_list(num_outputs());
      }
      grad = input_metadata(0).zeros_like();
    }
    return at::GradMode::is_enabled() ? derive(grad, Op::ANCHORED)
                                      : Op::backward({*plan, unpack(), wanted(), masked, bias_sum}, grad);
  }

  // For compiled autograd, which runs a graph's nodes by functions of all that they hold.
  void compiled_args(torch::autograd::CompiledNodeArgs& args) const override {
    args.collect(name());
    args.collect(reinterpret_cast<uint64_t>(plan.get()));
    args.collect(saved, true);  // the output is among them
  }

  variable_list apply_with_saved(const variable_list& grads, torch::autograd::SwapSavedVariables& swapped) override {
    swapped.before(saved);
    const auto tensors = unpack();
    torch::autograd::ivalue_list packed;
    std::vector<at::TypePtr> types;
    for (const Tensor& each : tensors) {
      packed.emplace_back(maybe(each));
      types.push_back(at::OptionalType::ofTensor());
    }
    const auto run = [plan = plan, inputs = wanted(), count = num_outputs()](
                         const variable_list& given, const std::vector<IValue>& held) {
      std::vector<Tensor> kept;
      for (const IValue& each : held) {
        kept.push_back(each.isNone() ? Tensor() : each.toTensor());
      }
      return given[0].defined() ? Op::backward({*plan, kept, inputs}, given[0]) : variable_list(count);
    };
    using namespace torch::dynamo::autograd;
    const auto& compiler = getPyCompilerInterface();
    const std::string function = compiler->bind_function(swapped.get_py_compiler(), name(), run, types, true, false);
    auto gradients = compiler->call_function(swapped.get_py_compiler(), "apply_functional", function, grads, packed,
        IValuePacker<std::vector<std::optional<InputMetadata>>>::pack(get_input_metadata(next_edges())));
    swapped.after(saved);
    return gradients;
  }
};

template <class Op>
auto new_node() {
  if constexpr (std::is_base_of_v<c10::intrusive_ptr_target, torch::autograd::Node>) {
    return c10::make_intrusive<NodeOf<Op>>();
  } else {  // up to torch 2.11
    return std::shared_ptr<NodeOf<Op>>(new NodeOf<Op>(), [](auto* node) { deleteNode(node); });
  }
}

template <class Pointer>
void tell_hooks(const Pointer& node) {
  if constexpr (requires { fire_node_creation_hooks(node); }) {
    fire_node_creation_hooks(node);
  }
}

inline bool needs_grad(std::initializer_list<const Tensor*> tensors) {
  return at::GradMode::is_enabled() && std::any_of(tensors.begin(), tensors.end(),
                                           [](const Tensor* t) { return t->defined() && t->requires_grad(); });
}

// Run `forward`, which returns the output and the codes that the backward needs, if any, and record it in the graph.
//
// inputs: the tensors that may get gradients; kept: the saved tensors that are not outputs of the call.
template <class Op, class Forward>
Tensor record(const PlanPtr& plan, std::initializer_list<Tensor> inputs, std::initializer_list<Tensor> kept,
    bool saves_output, const Forward& forward) {
  auto node = new_node<Op>();
  torch::autograd::edge_list edges;
  edges.reserve(inputs.size());
  for (const Tensor& each : inputs) {
    edges.push_back(each.defined() ? torch::autograd::impl::gradient_edge(each) : torch::autograd::Edge());
  }
  node->set_next_edges(std::move(edges));
  node->plan = plan;
  Tensor output, codes;
  {
    const Below below;
    std::tie(output, codes) = forward();
  }
  node->saved.reserve(kept.size() + 1);
  for (const Tensor& each : kept) {
    node->saved.emplace_back(each, false);
  }
  if (codes.defined()) {
    node->saved.emplace_back(codes, false);
  }
  torch::autograd::set_history(output, node);
  if (saves_output) {
    node->saved.emplace_back(output, true);
  }
  tell_hooks(node);
  return output;
}

inline std::tuple<Tensor, Tensor> both(std::vector<IValue>&& outputs) {
  std::tuple<Tensor, Tensor> taken(
      std::move(outputs.front()).toTensor(), outputs.size() > 1 ? std::move(outputs[1]).toTensor() : Tensor());
  outputs.clear();
  spare_stack = std::move(outputs);
  return taken;
}

inline Tensor first(std::vector<IValue>&& outputs) { return std::get<0>(both(std::move(outputs))); }

// Call with a batch axis in front of an unbatched input, and take it off the output.
template <class Run>
Tensor with_batch(const Plan& plan, const Tensor& input, const Run& run) {
  return plan.batched ? run(input) : run(input.unsqueeze(0)).squeeze(0);
}

}  // namespace fastcnn::front
