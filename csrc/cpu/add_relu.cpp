// Addition + ReLU in one pass over memory, whatever its layout; backward masks by the output's sign.

#include "../math/select.h"
#include "../ops.h"
#include "../tensors.h"
#include "threads.h"

namespace fastcnn::cpu {
namespace {

template <class T>
FASTCNN_CLONES void add_range(const T* __restrict x, const T* other, T* __restrict y, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    y[i] = static_cast<T>(relu(static_cast<float>(x[i]) + static_cast<float>(other[i])));
  }
}

template <class T>
FASTCNN_CLONES void mask_range(
    const T* __restrict grad, const T* __restrict y, T* __restrict dx, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const float value = static_cast<float>(grad[i]);
    dx[i] = static_cast<T>(relu_off(static_cast<float>(y[i])) ? 0.0f : value);
  }
}

}  // namespace

Tensor add_relu(const Tensor& input, const Tensor& other) {
  check_same_shape("add_relu", input, other);
  Tensor y = new_like(input);
  const Tensor x = laid_out_as(input, y), added = laid_out_as(other, y);
  with_type("add_relu", y, [&](auto type) {
    using T = decltype(type);
    parallel(y.numel(), 2,
        [&](int64_t begin, int64_t end) { add_range(data<T>(x), data<T>(added), mutable_data<T>(y), begin, end); });
  });
  return y;
}

Tensor add_relu_backward(const Tensor& grad, const Tensor& output) {
  check_same_shape("add_relu_backward", grad, output);
  Tensor dx = new_like(output);
  const Tensor from = laid_out_as(grad, dx), y = laid_out_as(output, dx);
  with_type("add_relu_backward", y, [&](auto type) {
    using T = decltype(type);
    parallel(y.numel(), 2,
        [&](int64_t begin, int64_t end) { mask_range(data<T>(from), data<T>(y), mutable_data<T>(dx), begin, end); });
  });
  return dx;
}

}  // namespace fastcnn::cpu
