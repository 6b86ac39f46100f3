#pragma once
// What the operators of a batch norm ask of their arguments, on every backend.

#include <optional>

#include "tensors.h"

namespace fastcnn {

// A channel's numbers, float32 (C,) and dense; weight and bias may be absent.
struct Norm {
  Tensor mean;
  Tensor variance;
  std::optional<Tensor> weight;
  std::optional<Tensor> bias;
  float eps;
};

inline Tensor channel_numbers(const Tensor& numbers, int64_t channels) {
  STD_TORCH_CHECK(numbers.dim() == 1 && numbers.size(0) == channels &&
                      numbers.scalar_type() == torch::headeronly::ScalarType::Float,
      "batch_norm: expected ", channels, " numbers in float32");
  return dense(numbers, false);
}

inline Norm make_norm(const Tensor& input, const Tensor& mean, const Tensor& variance,
    const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, double eps) {
  STD_TORCH_CHECK(input.dim() >= 2, "batch_norm: expected (N, C, *), got ", input.dim(), " axes");
  const auto given = [&](const std::optional<Tensor>& numbers) {
    return numbers ? std::optional<Tensor>(channel_numbers(*numbers, input.size(1))) : std::nullopt;
  };
  const int64_t channels = input.size(1);
  return {channel_numbers(mean, channels), channel_numbers(variance, channels), given(weight), given(bias),
      static_cast<float>(eps)};
}

inline const float* numbers_or_null(const std::optional<Tensor>& numbers) {
  return numbers ? data<float>(*numbers) : nullptr;
}

// An empty float32 tensor (C,).
inline Tensor new_numbers(const Tensor& like, int64_t channels) {
  const std::vector<int64_t> sizes{channels};
  return new_tensor(like, sizes, torch::headeronly::ScalarType::Float, false);
}

}  // namespace fastcnn
