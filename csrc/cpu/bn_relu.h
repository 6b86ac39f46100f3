#pragma once
// Batch norm on dense memory, as its stages use it.

#include <tuple>

#include "../batch_norm.h"

namespace fastcnn::cpu {

// A channel's numbers as the loops read them.
struct Numbers {
  std::vector<float> mean, scale, bias, inverse;

  explicit Numbers(const Norm& norm);
};

// Normalize the layout's images, with ReLU if asked. NCHW: the first plane belongs to channel `first`, and the layout
// may hold fewer channels than `numbers`.
template <class T>
void normalize_into(const T* x, T* y, const Layout& layout, int64_t first, const Numbers& numbers, bool relu);

// Return the gradients of input, weight and bias; the input's is written to `dx`, which may share `grad`'s memory. All
// are dense. masked: whether the ReLU's mask has been applied to `grad` already.
std::tuple<Tensor, Tensor, Tensor> normalize_backward(
    const Tensor& grad, const Tensor& x, Tensor dx, const Numbers& numbers, bool training, bool masked);

}  // namespace fastcnn::cpu
