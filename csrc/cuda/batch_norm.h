#pragma once
// Batch norm as the stages of several kernels use it.

#include <tuple>

#include "../batch_norm.h"
#include "../math/batch_norm.h"
#include "vector.h"

namespace fastcnn::cuda {

// Where the kernels read a channel's numbers; weight and bias may be null.
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

// The numbers of a thread's channels: one, or N neighbouring ones.
template <int N>
struct ThreadNorm {
  Floats<N> mean, inverse, scale, bias;

  __device__ __forceinline__ ThreadNorm(const Channels& channels, int64_t first, bool active) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      mean.at[i] = active ? channels.mean[first + i] : 0.0f;
      inverse.at[i] = active ? inverse_deviation(channels.variance[first + i], channels.eps) : 0.0f;
      scale.at[i] = active && channels.weight ? inverse.at[i] * channels.weight[first + i] : inverse.at[i];
      bias.at[i] = active && channels.bias ? channels.bias[first + i] : 0.0f;
    }
  }

  __device__ __forceinline__ float operator()(float x, int i) const {
    return normalise(x, mean.at[i], scale.at[i], bias.at[i]);
  }
};

// Write the gradients of the input, which may be the memory of `grad`, of weight and of bias. Dense tensors. masked:
// whether the ReLU's mask has been taken off `grad` already.
std::tuple<Tensor, Tensor, Tensor> normalise_backward(
    const Tensor& grad, const Tensor& x, Tensor dx, const Norm& norm, bool training, bool masked);

}  // namespace fastcnn::cuda
