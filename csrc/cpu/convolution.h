#pragma once
// torch's own convolution on the CPU, called without the dispatcher's search by name, which would double the time of a
// small one.

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <array>
#include <optional>

#include "../tensors.h"

namespace fastcnn::cpu {

// Convolve with bias, as the stock layer does: adding the bias there costs nothing and rounds as stock rounds. The
// output is dense, channels_last if the input or the weight is.
inline Tensor convolution(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, Sizes stride,
    Sizes padding, Sizes dilation, int64_t groups) {
  constexpr std::array<int64_t, 2> NO_OUTPUT_PADDING{0, 0};
  AtenTensorHandle bias_handle = bias ? bias->get() : nullptr, output = nullptr;
  FASTCNN_TORCH_CHECK(aoti_torch_cpu_convolution(input.get(), weight.get(), bias ? &bias_handle : nullptr,
      stride.data(), 2, padding.data(), 2, dilation.data(), 2, false, NO_OUTPUT_PADDING.data(), 2, groups, &output));
  return dense(Tensor(output), is_channels_last(input) || is_channels_last(weight));
}

}  // namespace fastcnn::cpu
