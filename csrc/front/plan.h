#pragma once
// What Python has planned of a call, and the operators that run it.

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/List.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/SafePyObject.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/PyInterpreter.h>
#include <torch/csrc/utils/object_ptr.h>

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "arguments.h"

namespace fastcnn::front {

using c10::IValue;
using c10::OperatorHandle;
using Maybe = std::optional<Tensor>;

// The names of an op's operators: for values alone, for values with what the backward needs, and the backward's.
struct Names {
  const char *values, *recorded, *backward, *statistics = nullptr;
};

struct Plan {
  enum class Way { PYTHON, STOCK, KERNEL };

  Way way = Way::PYTHON;
  bool batched = true;                   // whether the input has a batch axis already
  bool training = false;                 // of a batch norm or a dropout
  bool indices = false;                  // whether a stock pool gives its indices too
  std::optional<at::ScalarType> cast;    // autocast's dtype, where a kernel gets its tensors in it
  std::vector<int64_t> convolution;      // stride, padding, dilation, groups
  std::string padding;                   // of a stock convolution, where it has a name
  std::vector<int64_t> window;           // size, stride, padding, dilation, ceil_mode
  IValue convolution_list, window_list;  // the same, as operators take them
  IValue algorithm;
  int64_t size = 0, height = 0, width = 0;  // channels in an LRN's window; rows and columns of a pool's input
  std::vector<double> constants;
  std::optional<OperatorHandle> values, recorded, backward, statistics;
  // Python's backward in differentiable operations: derive(saved tensors, needs, gradient).
  std::optional<c10::SafePyObject> derive;

  at::IntArrayRef stride() const { return at::IntArrayRef(convolution).slice(0, 2); }
  at::IntArrayRef pads() const { return at::IntArrayRef(convolution).slice(2, 2); }
  at::IntArrayRef dilation() const { return at::IntArrayRef(convolution).slice(4, 2); }
  int64_t groups() const { return convolution[6]; }
};

using PlanPtr = std::shared_ptr<const Plan>;

inline OperatorHandle operator_of(const char* name, const std::string& backend) {
  return c10::Dispatcher::singleton().findSchemaOrThrow((std::string("fastcnn::") + name).c_str(), backend.c_str());
}

// The memory of a call's stack, for the thread's next call.
inline thread_local std::vector<IValue> spare_stack;

// Call an operator below autograd; return its outputs.
template <class... Args>
std::vector<IValue> call(const OperatorHandle& op, Args&&... args) {
  const at::AutoDispatchBelowADInplaceOrView below;
  std::vector<IValue> stack = std::move(spare_stack);
  stack.reserve(sizeof...(args));
  (stack.emplace_back(std::forward<Args>(args)), ...);
  op.callBoxed(stack);
  return stack;
}

namespace reading {

inline PyObject* field(PyObject* plan, const char* name) { return PyDict_GetItemString(plan, name); }  // borrowed

inline std::vector<int64_t> integers(PyObject* plan, const char* name) {
  std::vector<int64_t> numbers;
  if (PyObject* row = field(plan, name)) {
    for (Py_ssize_t i = 0; i < PyTuple_Size(row); ++i) {
      numbers.push_back(PyLong_AsLongLong(PyTuple_GET_ITEM(row, i)));
    }
  }
  return numbers;
}

inline int64_t integer(PyObject* plan, const char* name) {
  PyObject* value = field(plan, name);
  return value ? PyLong_AsLongLong(value) : 0;
}

inline std::string text(PyObject* plan, const char* name) {
  PyObject* value = field(plan, name);
  const char* letters = value && value != Py_None ? PyUnicode_AsUTF8(value) : nullptr;
  return letters ? letters : "";
}

inline bool flag(PyObject* plan, const char* name, bool otherwise) {
  PyObject* value = field(plan, name);
  return value ? value == Py_True : otherwise;
}

}  // namespace reading

// Read what Python's planner has answered: a dict, or None for the Python path.
inline PlanPtr read_plan(PyObject* answer, const Names& names) {
  auto plan = std::make_shared<Plan>();
  if (answer == Py_None) {
    return plan;
  }
  TORCH_CHECK_TYPE(PyDict_CheckExact(answer), "fastcnn: a plan is a dict or None");
  const std::string backend = reading::text(answer, "backend");
  plan->way = backend == "torch" ? Plan::Way::STOCK : Plan::Way::KERNEL;
  plan->batched = reading::flag(answer, "batched", true);
  plan->training = reading::flag(answer, "training", false);
  plan->indices = reading::flag(answer, "indices", false);
  plan->convolution = reading::integers(answer, "convolution");
  plan->padding = reading::text(answer, "padding");
  plan->window = reading::integers(answer, "window");
  plan->convolution_list = c10::List<int64_t>(at::IntArrayRef(plan->convolution));
  plan->window_list = c10::List<int64_t>(at::IntArrayRef(plan->window));
  if (const std::string algorithm = reading::text(answer, "algorithm"); !algorithm.empty()) {
    plan->algorithm = algorithm;
  }
  plan->size = reading::integer(answer, "size");
  plan->height = reading::integer(answer, "height");
  plan->width = reading::integer(answer, "width");
  if (PyObject* row = reading::field(answer, "constants")) {
    for (Py_ssize_t i = 0; i < PyTuple_Size(row); ++i) {
      plan->constants.push_back(PyFloat_AsDouble(PyTuple_GET_ITEM(row, i)));
    }
  }
  if (PyObject* cast = reading::field(answer, "cast"); cast && cast != Py_None) {
    plan->cast = reinterpret_cast<THPDtype*>(cast)->scalar_type;
  }
  if (plan->way == Plan::Way::KERNEL) {
    plan->values = operator_of(names.values, backend);
    plan->recorded = operator_of(names.recorded, backend);
    plan->backward = operator_of(names.backward, backend);
    if (names.statistics) {
      plan->statistics = operator_of(names.statistics, backend);
    }
    PyObject* derive = reading::field(answer, "derive");
    TORCH_CHECK_TYPE(derive, "fastcnn: the plan of a kernel names its derivative");
    Py_INCREF(derive);
    plan->derive.emplace(derive, getPyInterpreter());
  }
  if (PyErr_Occurred()) {
    throw python_error();
  }
  return plan;
}

}  // namespace fastcnn::front
