#pragma once
// What every operator does with tensors: layout, allocation, the choice of the element type.

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_aten.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/MemoryFormat.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <vector>

#include "math/lrn.h"
#include "math/window.h"

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

constexpr size_t MOST_AXES = 8;  // of a tensor that is allocated without the dispatcher

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
  const Sizes sizes = tensor.sizes(), strides = tensor.strides();  // each question goes through libtorch's C interface
  if ((axes != 4 && axes != 5) || strides[1] == 0) {
    return false;
  }
  int64_t least = 0;
  for (int64_t i = 0; i < axes; ++i) {
    const int64_t axis = i == 0 ? 1 : (i == axes - 1 ? 0 : axes - i);  // C, then the pixels' axes from the last, N
    const int64_t size = sizes[axis], stride = strides[axis];
    if (size == 0 || stride < least || (axis == 0 && least == strides[1])) {
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

inline bool is_dense(const Tensor& tensor, bool channels_last) {
  const int64_t axes = tensor.dim();
  const Sizes sizes = tensor.sizes(), strides = tensor.strides();
  int64_t stride = 1;
  for (int64_t i = 0; i < axes; ++i) {
    const int64_t last = axes - 1 - i;  // channels_last: C, then the pixels' axes from the last, N
    const int64_t axis = !channels_last || i == axes - 1 ? last : i == 0 ? 1 : last + 1;
    const int64_t size = sizes[axis];
    if (size != 1 && strides[axis] != stride) {
      return false;
    }
    stride *= size;
  }
  return true;
}

// The tensor, dense in the given layout. Only a tensor that must be copied goes through the dispatcher, which is slow.
inline Tensor dense(const Tensor& tensor, bool channels_last) {
  return is_dense(tensor, channels_last) ? tensor
                                         : torch::stable::contiguous(tensor, format(tensor.dim(), channels_last));
}

inline Tensor new_contiguous(const Tensor& like, Sizes sizes, int32_t dtype) {
  AtenTensorHandle made = nullptr;
  FASTCNN_TORCH_CHECK(aoti_torch_aten_new_empty(
      like.get(), sizes.data(), static_cast<int64_t>(sizes.size()), &dtype, nullptr, nullptr, 0, nullptr, &made));
  return Tensor(made);
}

inline bool poisons = false;  // whether what is allocated on the CPU is first filled with NaN, for tests

// An empty tensor on the CPU, without the dispatcher, and so without torch's own filling of new memory.
inline Tensor new_on_cpu(Sizes sizes, int32_t dtype, bool channels_last) {
  const auto axes = static_cast<int64_t>(sizes.size());
  std::array<int64_t, MOST_AXES> strides{};
  int64_t stride = 1;
  for (int64_t i = 0; i < axes; ++i) {
    const int64_t last = axes - 1 - i;  // channels_last: C, then the pixels' axes from the last, N
    const int64_t axis = !channels_last || i == axes - 1 ? last : i == 0 ? 1 : last + 1;
    strides[axis] = stride;
    stride *= channels_last ? sizes[axis] : std::max<int64_t>(sizes[axis], 1);
  }
  AtenTensorHandle made = nullptr;
  FASTCNN_TORCH_CHECK(
      aoti_torch_empty_strided(axes, sizes.data(), strides.data(), dtype, aoti_torch_device_type_cpu(), 0, &made));
  Tensor tensor(made);
  if (poisons) {
    std::memset(tensor.mutable_data_ptr(), 0xff, tensor.numel() * tensor.element_size());
  }
  return tensor;
}

// An empty tensor (N, C, *) on the device of another.
inline Tensor new_tensor(const Tensor& like, Sizes sizes, torch::headeronly::ScalarType dtype, bool channels_last) {
  const auto axes = static_cast<int64_t>(sizes.size());
  const auto type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
#ifndef FASTCNN_HOST_CUDA
  if (like.is_cpu() && sizes.size() <= MOST_AXES) {
    return new_on_cpu(sizes, type, channels_last);
  }
#endif
  if (!channels_last) {  // a third of the time of the dispatcher's search by name
    return new_contiguous(like, sizes, type);
  }
  return torch::stable::empty(sizes, dtype, std::nullopt, like.device(), std::nullopt, format(axes, channels_last));
}

// An empty tensor with the shape and strides of another.
inline Tensor new_like(const Tensor& like) {
  return is_dense(like, false) ? new_tensor(like, like.sizes(), like.scalar_type(), false)
                               : torch::stable::empty_like(like);
}

// The tensor with the strides of another of its shape, which is dense.
inline Tensor laid_out_as(const Tensor& tensor, const Tensor& like) {
  for (int64_t axis = 0; axis < like.dim(); ++axis) {
    if (tensor.stride(axis) != like.stride(axis)) {
      Tensor copy = torch::stable::empty_like(like);
      return torch::stable::copy_(copy, tensor);
    }
  }
  return tensor;
}

inline Layout layout(const Tensor& tensor, bool channels_last) {
  const Sizes sizes = tensor.sizes();
  int64_t pixels = 1;
  for (size_t axis = 2; axis < sizes.size(); ++axis) {
    pixels *= sizes[axis];
  }
  return {sizes[0], sizes[1], pixels, channels_last};
}

// Check that a gradient, or a second input, has the shape and dtype of the tensor that it belongs to.
inline void check_same_shape(const char* function, const Tensor& a, const Tensor& b) {
  STD_TORCH_CHECK(a.dim() == b.dim() && a.scalar_type() == b.scalar_type(), function, ": rank or dtype differ");
  for (int64_t axis = 0; axis < a.dim(); ++axis) {
    STD_TORCH_CHECK(a.size(axis) == b.size(axis), function, ": shapes differ");
  }
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

inline Window make_window(Sizes size, Sizes stride, Sizes padding, Sizes dilation, bool ceil_mode) {
  return {{size[0], stride[0], padding[0], dilation[0]}, {size[1], stride[1], padding[1], dilation[1]}, ceil_mode};
}

inline Plane make_plane(const Window& window, int64_t height, int64_t width) {
  return {height, width, output_size(window.rows, height, window.ceil_mode),
      output_size(window.columns, width, window.ceil_mode)};
}

inline int64_t round_up(int64_t value, int64_t multiple) { return ceil_div(value, multiple) * multiple; }

}  // namespace fastcnn
