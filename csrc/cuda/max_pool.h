#pragma once
// Max-pool as the stages that end in one use it.

#include <optional>
#include <utility>

#include "../tensors.h"

namespace fastcnn::cuda {

// Pool (N, C, H, W) to (N, C, OH, OW), after adding bias (C,) and ReLU if asked; codes are uint8, or empty if not asked
// for.
std::pair<Tensor, Tensor> pool(
    const Tensor& input, const std::optional<Tensor>& bias, const Window& window, bool relu, bool codes);

// Send gradients (N, C, OH, OW) back to their winners: (N, C, height, width), and their sums (C,) over all else, or
// (0,) if not asked for.
std::pair<Tensor, Tensor> pool_backward(
    const Tensor& grad, const Tensor& codes, int64_t height, int64_t width, const Window& window, bool bias_grad);

}  // namespace fastcnn::cuda
