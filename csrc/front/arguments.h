#pragma once
// A call's arguments: the tensors, and the key under which its plan is kept. The key holds by value all that a plan may
// depend on, so that a plan never serves a call that it was not made for: a list that changed is another key.

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/SavedTensorHooks.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/Tensor.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/csrc/autograd/python_variable.h>

#include <array>
#include <atomic>
#include <cstring>

namespace fastcnn::front {

using at::Tensor;

constexpr size_t MOST_TENSORS = 5;  // the first arguments of any function
constexpr size_t MOST_WORDS = 160, MOST_AXES = 8, MOST_NUMBERS = 4, MOST_LETTERS = 64;

using Tensors = std::array<Tensor, MOST_TENSORS>;  // undefined where an argument is no tensor

// Plain tensors: strided, on the CPU or a CUDA device, without wrappers, modes or lazy conjugates.
inline const uint64_t PLAIN_TENSOR =
    (c10::DispatchKeySet({c10::DispatchKey::CPU, c10::DispatchKey::CUDA, c10::DispatchKey::ADInplaceOrView,
         c10::DispatchKey::AutogradCPU, c10::DispatchKey::AutogradCUDA}) |
        c10::autocast_dispatch_keyset)
        .raw_repr();

// Whether the thread is in a state that plans know: as it starts, under autocast, or in inference mode. All other
// states (a dispatch mode, torch.func, tracing, another operator's kernel) set other dispatch keys.
inline bool is_plain(const c10::impl::LocalDispatchKeySet& keys) {
  const uint64_t in_inference = c10::autograd_dispatch_keyset.raw_repr(),
                 cast = c10::autocast_dispatch_keyset.raw_repr();
  const uint64_t usual = c10::default_included_set.raw_repr();
  const uint64_t without_views = usual & ~c10::DispatchKeySet(c10::DispatchKey::ADInplaceOrView).raw_repr();
  const uint64_t included = keys.included_.raw_repr();
  const uint64_t excluded = keys.excluded_.raw_repr() & ~cast, others = c10::default_excluded_set.raw_repr() & ~cast;
  return (included == usual && excluded == others) ||
         (included == without_views && excluded == (others | in_inference) && c10::InferenceMode::is_enabled());
}

template <class Level>
bool forward_mode() {
  if constexpr (requires { Level::has_any_level(); }) {
    return Level::has_any_level();
  } else {
    return Level::try_get_by_idx(0) != nullptr;
  }
}

inline std::atomic<uint64_t> epoch{0};           // grows when plans are forgotten
inline std::atomic<uint64_t> changes{0};         // grows with every choice too
inline std::atomic<uint64_t> process_choice{0};  // the number of the backend and algorithm asked for,
inline thread_local uint64_t own_choice = 0;     // or 0 where this thread follows the process
inline std::atomic<bool> plays_cuda{false};      // whether kernels for CUDA run on the CPU, as in tests

class Arguments {
 public:
  Tensors tensors;

  // Read a call's arguments; false where the front does not take such a call.
  bool read(PyObject* const* objects, size_t count) {
    const auto keys = c10::impl::tls_local_dispatch_key_set();
    if (!is_plain(keys) || at::impl::PythonTorchFunctionTLS::stack_len() > 0 ||
        !at::SavedTensorDefaultHooks::get_tls_state().stack.empty() ||
        forward_mode<torch::autograd::ForwardADLevel>()) {
      return false;
    }
    add_modes(keys.excluded_.raw_repr());
    for (size_t i = 0; i < count; ++i) {
      if (!add(objects[i], i)) {
        return false;
      }
    }
    return true;
  }

  const uint64_t* begin() const { return words_.data(); }
  const uint64_t* end() const { return words_.data() + count_; }

  uint64_t hash() const {
    uint64_t hash = 0x9e3779b97f4a7c15;
    for (uint64_t word : *this) {
      hash = (hash ^ word) * 0xff51afd7ed558ccd;
      hash ^= hash >> 29;
    }
    return hash;
  }

 private:
  enum Tag : uint64_t { NONE = 1, FALSE, TRUE, INT, FLOAT, TUPLE, LIST, STRING, DTYPE, TENSOR };

  std::array<uint64_t, MOST_WORDS> words_;
  size_t count_ = 0;

  void push(uint64_t word) { words_[count_++] = word; }
  void push(Tag tag, uint64_t detail) { push(uint64_t(tag) << 56 | detail); }

  void add_modes(uint64_t excluded) {
    const auto& context = at::globalContext();
    push(epoch.load(std::memory_order_relaxed) << 16 | (own_choice ? own_choice : process_choice.load()));
    push(uint64_t(at::get_num_threads()) << 8 | uint64_t(c10::InferenceMode::is_enabled()) << 3 |
         uint64_t(context.deterministicAlgorithmsWarnOnly()) << 2 | uint64_t(context.deterministicAlgorithms()) << 1 |
         uint64_t(at::GradMode::is_enabled()));
    push(excluded);
    if (excluded != c10::default_excluded_set.raw_repr()) {
      for (auto device : {at::kCPU, at::kCUDA}) {
        push(at::autocast::is_autocast_enabled(device) ? 1 + uint64_t(at::autocast::get_autocast_dtype(device)) : 0);
      }
    }
    if (plays_cuda.load(std::memory_order_relaxed)) {
      add_precision();
    }
  }

  // How a GPU multiplies float32.
  void add_precision() {
    const auto& context = at::globalContext();
    push(uint64_t(context.float32Precision(at::Float32Backend::CUDA, at::Float32Op::CONV)) << 32 |
         uint64_t(context.float32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL)));
  }

  bool add(PyObject* object, size_t position) {
    if (THPVariable_CheckExact(object)) {
      return add_tensor(THPVariable_Unpack(object), position);
    }
    if (count_ + 2 + MOST_LETTERS / 8 > MOST_WORDS) {
      return false;
    }
    if (object == Py_None || PyBool_Check(object)) {
      push(object == Py_None ? NONE : object == Py_True ? TRUE : FALSE, 0);
      return true;
    }
    if (PyFloat_CheckExact(object)) {
      uint64_t bits;
      const double value = PyFloat_AS_DOUBLE(object);
      std::memcpy(&bits, &value, sizeof(bits));
      push(FLOAT, 0);
      push(bits);
      return true;
    }
    if (PyTuple_CheckExact(object)) {
      return add_numbers(TUPLE, &PyTuple_GET_ITEM(object, 0), PyTuple_GET_SIZE(object));
    }
    if (PyList_CheckExact(object)) {
      const Py_ssize_t size = PyList_GET_SIZE(object);
      return add_numbers(LIST, size ? &PyList_GET_ITEM(object, 0) : nullptr, size);
    }
    if (PyUnicode_CheckExact(object)) {
      return add_string(object);
    }
    if (THPDtype_Check(object)) {
      push(DTYPE, uint64_t(reinterpret_cast<THPDtype*>(object)->scalar_type));
      return true;
    }
    push(INT, 0);
    return add_number(object);
  }

  bool add_number(PyObject* object) {
    int overflow = 1;
    const int64_t value = PyLong_CheckExact(object) ? PyLong_AsLongLongAndOverflow(object, &overflow) : 0;
    push(uint64_t(value));
    return overflow == 0;
  }

  bool add_numbers(Tag tag, PyObject* const* objects, Py_ssize_t size) {
    if (size > Py_ssize_t(MOST_NUMBERS)) {
      return false;
    }
    push(tag, uint64_t(size));
    for (Py_ssize_t i = 0; i < size; ++i) {
      if (!add_number(objects[i])) {
        return false;
      }
    }
    return true;
  }

  bool add_string(PyObject* object) {
    Py_ssize_t size = 0;
    const char* letters = PyUnicode_AsUTF8AndSize(object, &size);
    if (!letters) {
      PyErr_Clear();
      return false;
    }
    if (size > Py_ssize_t(MOST_LETTERS)) {
      return false;
    }
    push(STRING, uint64_t(size));
    for (Py_ssize_t i = 0; i < size; i += 8) {
      uint64_t word = 0;
      std::memcpy(&word, letters + i, std::min<Py_ssize_t>(8, size - i));
      push(word);
    }
    return true;
  }

  bool add_tensor(const Tensor& tensor, size_t position) {
    const auto* impl = tensor.unsafeGetTensorImpl();
    const uint64_t keys = impl->key_set().raw_repr();
    if ((keys & ~PLAIN_TENSOR) != 0 || position >= MOST_TENSORS || impl->has_symbolic_sizes_strides()) {
      return false;
    }
    const auto sizes = impl->sizes(), strides = impl->strides();
    if (sizes.size() > MOST_AXES || count_ + 3 + 2 * MOST_AXES > MOST_WORDS) {
      return false;
    }
    const at::Device device = impl->device();
    push(TENSOR, uint64_t(sizes.size()) << 48 | uint64_t(impl->requires_grad()) << 40 |
                     uint64_t(tensor.scalar_type()) << 24 | uint64_t(uint8_t(device.index())) << 8 |
                     uint64_t(uint8_t(device.type())));
    push(keys);
    for (size_t i = 0; i < sizes.size(); ++i) {
      push(uint64_t(sizes[i]));
      push(uint64_t(strides[i]));
    }
    if (position == 0 && device.is_cuda()) {
      add_precision();
    }
    tensors[position] = tensor;
    return true;
  }
};

}  // namespace fastcnn::front
