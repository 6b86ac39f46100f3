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

// Normalise the layout's images, with ReLU if asked. In NCHW the first plane is of the channel `first`, and the layout
// may hold fewer channels than there are numbers.
template <class T>
void normalise_into(const T* x, T* y, const Layout& layout, int64_t first, const Numbers& numbers, bool relu);

// The gradients of the input, of weight and of bias. Dense tensors; `grad` is that of the ReLU's output.
std::tuple<Tensor, Tensor, Tensor> normalise_backward(
    const Tensor& grad, const Tensor& x, const Numbers& numbers, bool training);

// The same where a pool follows: `grad` and `codes` are those of its output, which tell where the ReLU is off.
std::tuple<Tensor, Tensor, Tensor> normalise_pool_backward(const Tensor& grad, const Tensor& codes, const Tensor& x,
    const Window& window, const Numbers& numbers, bool training);

}  // namespace fastcnn::cpu
