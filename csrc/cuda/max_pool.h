#pragma once
// Max-pool as the stages that end in one use it.

#include <optional>
#include <utility>

#include "../tensors.h"

namespace fastcnn::cuda {

// What kernels take: offsets need 64 bits, rows and columns do not.
using Window32 = WindowOf<int32_t>;
using Plane32 = PlaneOf<int32_t>;

inline int32_t narrow(int64_t size) {
  STD_TORCH_CHECK(size < 1 << 30, "fastcnn: ", size, " rows, columns or pixels of a window are too many");
  return static_cast<int32_t>(size);
}

inline AxisOf<int32_t> narrow(const Axis& axis) {
  return {narrow(axis.size), narrow(axis.stride), narrow(axis.padding), narrow(axis.dilation)};
}

inline Window32 narrow(const Window& window) { return {narrow(window.rows), narrow(window.columns), window.ceil_mode}; }

inline Plane32 narrow(const Plane& plane) {
  return {narrow(plane.height), narrow(plane.width), narrow(plane.out_height), narrow(plane.out_width)};
}

// Pool (N, C, H, W) to (N, C, OH, OW), after adding bias (C,) and ReLU if asked; codes are uint8, or empty if not asked
// for.
std::pair<Tensor, Tensor> pool(
    const Tensor& input, const std::optional<Tensor>& bias, const Window& window, bool relu, bool codes);

// Send gradients (N, C, OH, OW) back to their winners: (N, C, height, width), and their sums (C,) over all else, or
// (0,) if not asked for.
std::pair<Tensor, Tensor> pool_backward(
    const Tensor& grad, const Tensor& codes, int64_t height, int64_t width, const Window& window, bool bias_grad);

}  // namespace fastcnn::cuda
