#pragma once
// What every CPU operator does with tensors: layout, allocation, the choice of the element type, threads.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/MemoryFormat.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../math/lrn.h"
#include "../math/window.h"

// The hot loops are compiled several times and the processor's best version is taken when the library is loaded.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__SANITIZE_ADDRESS__)
#define FASTCNN_CLONES __attribute__((target_clones("default", "avx2", "avx512f")))
#else
#define FASTCNN_CLONES
#endif

// Newer headers keep the message of torch's own error.
#ifdef STABLE_TORCH_ERROR_CODE_CHECK
#define FASTCNN_TORCH_CHECK STABLE_TORCH_ERROR_CODE_CHECK
#else
#define FASTCNN_TORCH_CHECK TORCH_ERROR_CODE_CHECK
#endif

namespace fastcnn {

using torch::stable::Tensor;
using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;
using BFloat16 = torch::headeronly::BFloat16;
using Half = torch::headeronly::Half;

// (N, C, pixels) of a dense tensor whose channels are its fastest axis or not.
struct Layout {
  int64_t images;
  int64_t channels;
  int64_t pixels;
  bool channels_last;
};

// Whether torch would give the output the channels_last format (torch._prims_common.suggest_memory_format).
inline bool is_channels_last(const Tensor& tensor) {
  const int64_t axes = tensor.dim();
  if ((axes != 4 && axes != 5) || tensor.stride(1) == 0) {
    return false;
  }
  int64_t least = 0;
  for (int64_t i = 0; i < axes; ++i) {
    const int64_t axis = i == 0 ? 1 : (i == axes - 1 ? 0 : axes - i);  // C, then the pixels' axes from the last, N
    const int64_t size = tensor.size(axis), stride = tensor.stride(axis);
    if (size == 0 || stride < least || (axis == 0 && least == tensor.stride(1))) {
      return false;
    }
    least = stride * size;
  }
  return true;
}

inline torch::headeronly::MemoryFormat format(int64_t axes, bool channels_last) {
  using torch::headeronly::MemoryFormat;
  if (!channels_last) {
    return MemoryFormat::Contiguous;
  }
  return axes == 5 ? MemoryFormat::ChannelsLast3d : MemoryFormat::ChannelsLast;
}

// The tensor without gaps, in the given layout.
inline Tensor dense(const Tensor& tensor, bool channels_last) {
  return torch::stable::contiguous(tensor, format(tensor.dim(), channels_last));
}

// An empty CPU tensor: (N, C, *).
inline Tensor new_tensor(Sizes sizes, torch::headeronly::ScalarType dtype, bool channels_last) {
  const auto axes = static_cast<int64_t>(sizes.size());
  return torch::stable::empty(sizes, dtype, std::nullopt, std::nullopt, std::nullopt, format(axes, channels_last));
}

inline Layout layout(const Tensor& tensor, bool channels_last) {
  int64_t pixels = 1;
  for (int64_t axis = 2; axis < tensor.dim(); ++axis) {
    pixels *= tensor.size(axis);
  }
  return {tensor.size(0), tensor.size(1), pixels, channels_last};
}

// Call run(T{}) with the element type of the tensor.
template <class Run>
void with_type(const char* function, const Tensor& tensor, const Run& run) {
  using torch::headeronly::ScalarType;
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return run(float{});
    case ScalarType::BFloat16:
      return run(BFloat16{});
    case ScalarType::Half:
      return run(Half{});
    default:
      STD_TORCH_CHECK(false, function, ": expected float32, bfloat16 or float16");
  }
}

template <class T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <class T>
T* mutable_data(Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// Split [0, count) among torch's threads; an item costs about `cost` simple operations.
template <class Run>
void parallel(int64_t count, int64_t cost, const Run& run) {
  constexpr int64_t COST_OF_A_THREAD = 32768;
  if (count > 0) {
    torch::stable::parallel_for(0, count, std::max<int64_t>(1, COST_OF_A_THREAD / std::max<int64_t>(cost, 1)), run);
  }
}

inline int64_t round_up(int64_t value, int64_t multiple) { return ceil_div(value, multiple) * multiple; }

}  // namespace fastcnn
