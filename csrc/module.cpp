// The Python module fastcnn._C: importing it registers the operators, and it tells what the build holds. It keeps to
// Python's limited API, so that one build serves every Python from 3.11.

#include <Python.h>

#include "tensors.h"

#define STRING_OF(x) #x
#define STRING(x) STRING_OF(x)

namespace {

#ifdef FASTCNN_CUDA  // the toolkit's version and the architectures, as setup.py chose them
constexpr const char* CUDA = STRING(FASTCNN_CUDA);
constexpr const char* ARCHITECTURES = STRING(FASTCNN_ARCHITECTURES);
#else
constexpr const char *CUDA = nullptr, *ARCHITECTURES = nullptr;
#endif

PyObject* built_with(PyObject*, PyObject*) {
  return Py_BuildValue("{s:s,s:s,s:z,s:z}", "torch", STRING(FASTCNN_TORCH), "compiler", "g++ " __VERSION__, "cuda",
      CUDA, "architectures", ARCHITECTURES);
}

PyObject* poison(PyObject*, PyObject* on) {
  const bool before = fastcnn::poisons;
  fastcnn::poisons = on == Py_True;
  return PyBool_FromLong(before);
}

PyMethodDef methods[] = {
    {"built_with", built_with, METH_NOARGS,
        "Return what this build holds: the oldest torch it runs with, its compiler, and its CUDA version and "
        "architectures "
        "or None."},
    {"poison", poison, METH_O,
        "Fill what the CPU's kernels allocate with NaN first, or not, for tests; return what held before."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_C", "fastcnn's compiled kernels.", -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&module); }
