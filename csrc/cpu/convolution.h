#pragma once
// torch's own convolution on the CPU.

#include <array>
#include <optional>

#include "../tensors.h"

namespace fastcnn::cpu {

// Convolve with bias, as the stock layer does: adding the bias there costs nothing and rounds as stock rounds. The
// output is dense, channels_last if the input or the weight is. By the stock layer's very operator, in which the
// profiler counts FLOPs.
inline Tensor convolution(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, Sizes stride,
    Sizes padding, Sizes dilation, int64_t groups) {
  using torch::stable::detail::from;
  std::array<StableIValue, 7> stack{
      from(input), from(weight), from(bias), from(stride), from(padding), from(dilation), from(groups)};
  FASTCNN_TORCH_CHECK(torch_call_dispatcher("aten::conv2d", "", stack.data(), TORCH_ABI_VERSION));
  return dense(torch::stable::detail::to<Tensor>(stack[0]), is_channels_last(input) || is_channels_last(weight));
}

}  // namespace fastcnn::cpu
