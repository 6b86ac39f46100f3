#pragma once
// Batch norm as the stages of several kernels use it.

#include <tuple>

#include "../batch_norm.h"
#include "../math/batch_norm.h"
#include "vector.h"

namespace fastcnn::cuda {

// The same numbers where vectors of four may be read.
inline Tensor aligned_numbers(const Tensor& numbers) {
  if (is_aligned(numbers.const_data_ptr(), 16)) {
    return numbers;
  }
  Tensor copy = torch::stable::empty_like(numbers);
  return torch::stable::copy_(copy, numbers);
}

inline Norm aligned(const Norm& norm) {
  const auto given = [](const std::optional<Tensor>& numbers) {
    return numbers ? std::optional<Tensor>(aligned_numbers(*numbers)) : std::nullopt;
  };
  return {aligned_numbers(norm.mean), aligned_numbers(norm.variance), given(norm.weight), given(norm.bias), norm.eps};
}

// Where the kernels read a channel's numbers, aligned; weight and bias may be null.
struct Channels {
  const float* mean;
  const float* variance;
  const float* weight;
  const float* bias;
  float eps;

  Channels() = default;
  explicit Channels(const Norm& norm)
      : mean(data<float>(norm.mean)),
        variance(data<float>(norm.variance)),
        weight(numbers_or_null(norm.weight)),
        bias(numbers_or_null(norm.bias)),
        eps(norm.eps) {}
};

// The numbers of N neighbouring channels, or `otherwise` where there are none.
template <int N>
__device__ __forceinline__ Floats<N> load_numbers(const float* numbers, int first, float otherwise) {
  if (numbers == nullptr) {
    return broadcast<N>(otherwise);
  }
  Floats<N> loaded;
  constexpr int TOGETHER = N < 4 ? N : 4;
#pragma unroll
  for (int i = 0; i < N; i += TOGETHER) {
    const Vector<float, TOGETHER> some = load_packed<TOGETHER>(numbers + first + i);
#pragma unroll
    for (int j = 0; j < TOGETHER; ++j) {
      loaded.at[i + j] = some.at[j];
    }
  }
  return loaded;
}

// The numbers of a thread's channels: one, or N neighbouring ones. A thread that is not active takes those of the
// first.
template <int N>
struct ThreadNorm {
  Floats<N> mean, inverse, scale, bias;

  __device__ __forceinline__ ThreadNorm(const Channels& channels, int channel, bool active) {
    const int first = active ? channel : 0;
    mean = load_numbers<N>(channels.mean, first, 0.0f);
    inverse = load_numbers<N>(channels.variance, first, 0.0f);
    scale = load_numbers<N>(channels.weight, first, 1.0f);
    bias = load_numbers<N>(channels.bias, first, 0.0f);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      inverse.at[i] = inverse_deviation(inverse.at[i], channels.eps);
      scale.at[i] *= inverse.at[i];
    }
  }

  __device__ __forceinline__ float operator()(float x, int i) const {
    return normalize(x, mean.at[i], scale.at[i], bias.at[i]);
  }
};

// Write the gradients of the input, which may be the memory of `grad`, of weight and of bias. Dense tensors. masked:
// whether the ReLU's mask has been taken off `grad` already.
std::tuple<Tensor, Tensor, Tensor> normalize_backward(
    const Tensor& grad, const Tensor& x, Tensor dx, const Norm& norm, bool training, bool masked);

}  // namespace fastcnn::cuda
