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

// The elements from an image, a row and a pixel to the next. Offsets within an image are counted in 32 bits where
// MOST_OFFSETS allow: an address then takes one instruction, and six where compilers may sort sums of 64 bits.
struct PlaneStrides {
  int64_t image;
  uint32_t line, pixel;

  PlaneStrides() = default;
  PlaneStrides(int64_t height, int64_t width, int64_t pixel)
      : image(height * width * pixel),
        line(static_cast<uint32_t>(narrow(width * pixel))),
        pixel(static_cast<uint32_t>(narrow(pixel))) {}
};

constexpr int64_t MOST_OFFSETS = int64_t{1} << 32, MOST_INDEX = (int64_t{1} << 31) - 1;

// A row or column of an axis, or the nearest there is.
FASTCNN_HOST_DEVICE int into(int index, int length) {
  const int low = index < length - 1 ? index : length - 1;
  return low > 0 ? low : 0;
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
