#pragma once
// Max-pool over a dense input, as the stages that end in one use it.

#include <utility>

#include "../tensors.h"

namespace fastcnn::cpu {

// Pool (N, C, H, W) to (N, C, OH, OW), with ReLU if asked; codes are uint8, or empty if not asked for.
std::pair<Tensor, Tensor> pool(const Tensor& input, const Window& window, bool relu, bool codes);

// Add each gradient (N, C, OH, OW) to its winner's place in (N, C, height, width); bias, (C,) or null, gets their sums
// over the other axes.
Tensor pool_backward(
    const Tensor& grad, const Tensor& codes, int64_t height, int64_t width, const Window& window, Tensor* bias);

// The same on dense memory, for lrn_pool. Inside a parallel section they run in the calling thread. codes may be null;
// sums, if not null, gets partial sums for a bias gradient.
template <class T>
void pool_into(
    const T* x, T* y, uint8_t* codes, const Plane& plane, const Layout& layout, const Window& window, bool relu);
template <class T>
void pool_backward_into(const T* grad, const uint8_t* codes, T* dx, float* sums, const Plane& plane,
    const Layout& layout, const Window& window);

}  // namespace fastcnn::cpu
