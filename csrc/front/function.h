#pragma once
// The Python object that runs an op's calls by their plans.

#include <torch/csrc/Exceptions.h>

#include <unordered_map>

#include "plan.h"

namespace fastcnn::front {

constexpr size_t MOST_PLANS = 1024;  // of one op

// What an op's calls run: the stock layers, or a kernel.
struct Runners {
  const char* stem;
  Names names;
  Tensor (*stock)(const Plan&, const Tensors&);
  Tensor (*kernel)(const PlanPtr&, const Tensors&);
  std::tuple<Tensor, Tensor> (*stock_with_indices)(const Plan&, const Tensors&) = nullptr;
};

// The plans of one op; used with the GIL held.
class Plans {
 public:
  PlanPtr find(const Arguments& call) const {
    const auto found = plans_.find(call.hash());
    return found != plans_.end() && is_of(found->second, call) ? found->second.plan : nullptr;
  }

  void keep(const Arguments& call, const PlanPtr& plan) {
    if (plans_.size() >= MOST_PLANS) {
      plans_.clear();
    }
    plans_[call.hash()] = {{call.begin(), call.end()}, plan};
  }

  void forget() { plans_.clear(); }
  size_t size() const { return plans_.size(); }

 private:
  struct Kept {
    std::vector<uint64_t> key;
    PlanPtr plan;
  };

  std::unordered_map<uint64_t, Kept> plans_;

  static bool is_of(const Kept& kept, const Arguments& call) {
    return std::equal(kept.key.begin(), kept.key.end(), call.begin(), call.end());
  }
};

struct Function {
  PyObject_HEAD vectorcallfunc vectorcall;
  const Runners* runners;
  PyObject *planner, *check, *python;  // what plans a call, says more about one that stock refuses, and runs any call
  Plans* plans;
};

inline std::atomic<int> aside{0};  // while above 0 every call goes down the Python path

inline PyObject* run(const Function& function, const PlanPtr& plan, const Tensors& tensors) {
  HANDLE_TH_ERRORS
  const Runners& runners = *function.runners;
  Tensor output, indices;
  {
    const pybind11::gil_scoped_release others;
    if (plan->indices) {
      std::tie(output, indices) = runners.stock_with_indices(*plan, tensors);
    } else {
      output = plan->way == Plan::Way::STOCK ? runners.stock(*plan, tensors) : runners.kernel(plan, tensors);
    }
  }
  THPObjectPtr first(THPVariable_Wrap(std::move(output)));
  if (!first || !plan->indices) {
    return first.release();
  }
  THPObjectPtr second(THPVariable_Wrap(std::move(indices)));
  return second ? PyTuple_Pack(2, first.get(), second.get()) : nullptr;
  END_HANDLE_TH_ERRORS
}

// Ask Python for the plan of a call and keep it; null with an error set where the call is refused.
inline PlanPtr ask(const Function& function, PyObject* const* objects, size_t count, const Arguments& call) {
  const uint64_t before = changes;
  THPObjectPtr answer(PyObject_Vectorcall(function.planner, objects, count, nullptr));
  if (!answer) {
    return nullptr;
  }
  try {
    PlanPtr plan = read_plan(answer, function.runners->names);
    if (changes == before) {  // nothing has changed while Python planned
      function.plans->keep(call, plan);
    }
    return plan;
  } catch (...) {
    torch::translate_exception_to_python(std::current_exception());
    return nullptr;
  }
}

// Stock has refused a call: let Python say more about a mistake that it knows; else torch's error stands.
inline PyObject* explain(const Function& function, PyObject* const* objects, size_t count) {
  PyObject *type, *value, *trace;
  PyErr_Fetch(&type, &value, &trace);
  THPObjectPtr checked(PyObject_Vectorcall(function.check, objects, count, nullptr));
  if (checked) {
    PyErr_Restore(type, value, trace);
  } else {
    Py_XDECREF(type);
    Py_XDECREF(value);
    Py_XDECREF(trace);
  }
  return nullptr;
}

inline PyObject* call_function(PyObject* self, PyObject* const* objects, size_t flags, PyObject* names) {
  const auto& function = *reinterpret_cast<Function*>(self);
  const auto count = size_t(PyVectorcall_NARGS(flags));
  Arguments call;
  bool taken = false;
  try {
    taken = !names && aside == 0 && call.read(objects, count);
  } catch (...) {
    torch::translate_exception_to_python(std::current_exception());
    return nullptr;
  }
  if (!taken) {
    return PyObject_Vectorcall(function.python, objects, flags, names);
  }
  PlanPtr plan = function.plans->find(call);
  if (!plan && !(plan = ask(function, objects, count, call))) {
    return nullptr;
  }
  if (plan->way == Plan::Way::PYTHON) {
    return PyObject_Vectorcall(function.python, objects, count, nullptr);
  }
  PyObject* output = run(function, plan, call.tensors);
  return output || plan->way != Plan::Way::STOCK ? output : explain(function, objects, count);
}

}  // namespace fastcnn::front
