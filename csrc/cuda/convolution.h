#pragma once
// A convolution of ours, and what it may have in its epilogue.

#include <optional>
#include <utility>

#include "../tensors.h"

namespace fastcnn::cuda {

struct Convolution {
  Tensor input;                // (N, C, H, W)
  Tensor weight;               // (C_out, C / groups, R, S)
  std::optional<Tensor> bias;  // (C_out,)
  Window window;               // R x S
  int64_t groups;
};

inline Convolution make_convolution(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
    Sizes stride, Sizes padding, Sizes dilation, int64_t groups) {
  const std::vector<int64_t> size{weight.size(2), weight.size(3)};
  return {input, weight, bias, make_window(size, stride, padding, dilation, false), groups};
}

// Whether the output is channels_last: if the input or the weight is.
inline bool gives_channels_last(const Convolution& convolution) {
  return is_channels_last(convolution.input) || is_channels_last(convolution.weight);
}

// What follows the convolution and its bias in the same kernel.
enum class Fused {
  RELU,
  RELU_POOL,        // and 2x2 max-pool, stride 2, without padding
  RELU_POOL_CODES,  // and its codes
};

// Whether a kernel's epilogue can have this pool, given the convolution's output. (A partial window of ceil_mode
// cannot.)
inline bool fits_epilogue(const Window& pool, const Plane& plane) {
  const auto fits = [](const Axis& axis) {
    return axis.size == 2 && axis.stride == 2 && axis.padding == 0 && axis.dilation == 1;
  };
  return fits(pool.rows) && fits(pool.columns) && plane.out_height * 2 <= plane.height &&
         plane.out_width * 2 <= plane.width;
}

// The convolution as a matrix product on tensor cores, its matrix of pixels read straight from the input: output and
// codes, which are empty if not asked for. float32 is multiplied in TF32.
std::pair<Tensor, Tensor> implicit_gemm(const Convolution& convolution, Fused fused);

// The convolution of an image of few channels (colours), from a patch in shared memory: output and codes.
std::pair<Tensor, Tensor> direct(const Convolution& convolution, Fused fused);

}  // namespace fastcnn::cuda
