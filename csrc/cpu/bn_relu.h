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

// Normalize the layout's images, with ReLU if asked. In NCHW the first plane is of the channel `first`, and the layout
// may hold fewer channels than there are numbers.
template <class T>
void normalize_into(const T* x, T* y, const Layout& layout, int64_t first, const Numbers& numbers, bool relu);

// Write the gradients of the input, which may be the memory of `grad`, of weight and of bias. Dense tensors. masked:
// whether the ReLU's mask has been taken off `grad` already.
std::tuple<Tensor, Tensor, Tensor> normalize_backward(
    const Tensor& grad, const Tensor& x, Tensor dx, const Numbers& numbers, bool training, bool masked);

}  // namespace fastcnn::cpu
