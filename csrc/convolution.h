#pragma once
// torch's own convolution, called through the dispatcher.

#include <array>
#include <optional>

#include "tensors.h"

namespace fastcnn {

// Convolve with bias, as the stock layer does: adding the bias there costs nothing and rounds as stock rounds. The
// output is dense, channels_last if the input or the weight is.
inline Tensor convolution(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, Sizes stride,
    Sizes padding, Sizes dilation, int64_t groups) {
  using torch::stable::detail::from;
  const std::vector<int64_t> no_output_padding{0, 0};
  std::array<StableIValue, 9> stack{from(input), from(weight), from(bias), from(stride), from(padding), from(dilation),
      from(false), from(Sizes(no_output_padding)), from(groups)};
  FASTCNN_TORCH_CHECK(torch_call_dispatcher("aten::convolution", "", stack.data(), TORCH_ABI_VERSION));
  const Tensor output = torch::stable::detail::to<Tensor>(stack[0]);
  return dense(output, is_channels_last(input) || is_channels_last(weight));
}

}  // namespace fastcnn
