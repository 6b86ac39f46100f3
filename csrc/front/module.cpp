// The Python module fastcnn._front: Python plans a call once, this runs it from then on. It is built against one torch,
// whose classes it uses, and refuses to be loaded beside another; kernels (fastcnn._C) know nothing of it.

#include <torch/version.h>

#include "add_relu.h"
#include "bn_relu.h"
#include "bn_relu_pool.h"
#include "conv_relu.h"
#include "conv_relu_pool.h"
#include "function.h"
#include "linear_relu.h"
#include "linear_relu_dropout.h"
#include "lrn.h"
#include "lrn_pool.h"
#include "max_pool.h"

namespace fastcnn::front {
namespace {

template <class Op>
constexpr Runners runners_of() {
  if constexpr (requires { &Op::stock_with_indices; }) {
    return {Op::STEM, Op::NAMES, &Op::stock, &Op::kernel, &Op::stock_with_indices};
  } else {
    return {Op::STEM, Op::NAMES, &Op::stock, &Op::kernel};
  }
}

constexpr std::array RUNNERS{runners_of<AddReLU>(), runners_of<BatchNormReLU>(), runners_of<BatchNormReLUPool>(),
    runners_of<ConvReLU>(), runners_of<ConvReLUPool>(), runners_of<LinearReLU>(), runners_of<LinearReLUDropout>(),
    runners_of<LRN>(), runners_of<LRNPool>(), runners_of<MaxPool>()};

std::vector<Function*>& functions() {
  static std::vector<Function*> all;
  return all;
}

PyTypeObject function_type{PyVarObject_HEAD_INIT(nullptr, 0)};

// function(stem, planner, check, python): make the caller of an op; it lives as long as the process.
PyObject* new_function(PyObject*, PyObject* args) {
  const char* stem;
  PyObject *planner, *check, *python;
  if (!PyArg_ParseTuple(args, "sOOO", &stem, &planner, &check, &python)) {
    return nullptr;
  }
  for (const Runners& each : RUNNERS) {
    if (std::strcmp(each.stem, stem) == 0) {
      auto* function = PyObject_New(Function, &function_type);
      if (!function) {
        return nullptr;
      }
      function->vectorcall = call_function;
      function->runners = &each;
      function->planner = Py_NewRef(planner);
      function->check = Py_NewRef(check);
      function->python = Py_NewRef(python);
      function->plans = new Plans;
      functions().push_back(function);
      return Py_NewRef(reinterpret_cast<PyObject*>(function));
    }
  }
  return PyErr_Format(PyExc_ValueError, "fastcnn._front runs no op %s", stem);
}

PyObject* forget(PyObject*, PyObject*) {
  ++epoch;
  ++changes;
  for (Function* each : functions()) {
    each->plans->forget();
  }
  Py_RETURN_NONE;
}

// choose(own, process): note the numbers of what this thread, 0 for none, and the process have chosen.
PyObject* choose(PyObject*, PyObject* args) {
  unsigned long long own, process;
  if (!PyArg_ParseTuple(args, "KK", &own, &process)) {
    return nullptr;
  }
  ++changes;
  own_choice = own;
  process_choice = process;
  Py_RETURN_NONE;
}

PyObject* step_aside(PyObject*, PyObject* by) {
  const long step = PyLong_AsLong(by);
  if (step == -1 && PyErr_Occurred()) {
    return nullptr;
  }
  aside += int(step);
  Py_RETURN_NONE;
}

PyObject* watch_precision(PyObject*, PyObject*) {
  plays_cuda = true;
  Py_RETURN_NONE;
}

PyObject* plan_count(PyObject*, PyObject*) {
  size_t count = 0;
  for (Function* each : functions()) {
    count += each->plans->size();
  }
  return PyLong_FromSize_t(count);
}

PyMethodDef methods[] = {
    {"function", new_function, METH_VARARGS, "Return what runs an op: function(stem, planner, check, python)."},
    {"forget", forget, METH_NOARGS, "Forget every plan."},
    {"choose", choose, METH_VARARGS, "Note which backend this thread, and the process, have chosen, by numbers."},
    {"aside", step_aside, METH_O, "Add to the number of those that want the Python path."},
    {"watch_precision", watch_precision, METH_NOARGS, "Key plans on the CPU by how a GPU multiplies float32, too."},
    {"plans", plan_count, METH_NOARGS, "Return the number of plans that are kept."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_front", "Runs planned calls.", -1, methods, nullptr, nullptr, nullptr, nullptr};

// Give the nodes of an op a class of their name in Python.
template <class Op>
void name_node() {
  static PyTypeObject type{PyVarObject_HEAD_INIT(nullptr, 0)};
  PyGetSetDef* properties = nullptr;
  if constexpr (requires { Op::properties(); }) {
    properties = Op::properties();
  }
  torch::autograd::_initFunctionPyTypeObject(type, Op::NODE, properties, nullptr);
  torch::autograd::registerCppFunction(typeid(NodeOf<Op>), &type);
}

// Whether the torch that runs is the one whose headers this was built with.
bool is_own_torch() {
  THPObjectPtr torch(PyImport_ImportModule("torch"));
  THPObjectPtr version(torch ? PyObject_GetAttrString(torch, "__version__") : nullptr);
  THPObjectPtr text(version ? PyObject_Str(version) : nullptr);
  const char* letters = text ? PyUnicode_AsUTF8(text) : nullptr;
  if (!letters) {
    return false;
  }
  const std::string running = std::string(letters).substr(0, std::strcspn(letters, "+"));
  if (running != TORCH_VERSION) {
    PyErr_Format(PyExc_ImportError, "it was built for torch %s, this is torch %s", TORCH_VERSION, letters);
    return false;
  }
  return true;
}

}  // namespace
}  // namespace fastcnn::front

PyMODINIT_FUNC PyInit__front() {
  using namespace fastcnn::front;
  if (!is_own_torch()) {
    return nullptr;
  }
  function_type.tp_name = "fastcnn._front.Function";
  function_type.tp_basicsize = sizeof(Function);
  function_type.tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_VECTORCALL;
  function_type.tp_vectorcall_offset = offsetof(Function, vectorcall);
  function_type.tp_call = PyVectorcall_Call;
  if (PyType_Ready(&function_type) < 0) {
    return nullptr;
  }
  name_node<AddReLU>();
  name_node<BatchNormReLU>();
  name_node<BatchNormReLUPool>();
  name_node<ConvReLU>();
  name_node<ConvReLUPool>();
  name_node<LinearReLU>();
  name_node<LRN>();
  name_node<LRNPool>();
  name_node<MaxPool>();
  return PyModule_Create(&module);
}
