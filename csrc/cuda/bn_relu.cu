// Batch norm + ReLU: one pass to normalize; backward: one for the gradients' sums, one that writes. The ReLU's mask is
// computed again from x, rounded as the output was.

#include "../math/select.h"
#include "../ops.h"
#include "batch_norm.h"
#include "launch.h"
#include "merge.h"
#include "vector.h"
#include "vectors.h"
#include "walk.h"

namespace fastcnn::cuda {
namespace {

constexpr int DEPTH = 2;       // vectors of a thread, of each tensor, that are on their way together
constexpr int SUMS_DEPTH = 8;  // of a thread at least where it leaves sums

template <int N, int M, int COUNT, class T>
__device__ __forceinline__ void bn_relu(const T* x, T* y, int64_t step, const ThreadNorm<M>& norm) {
  Vector<T, N> packed[COUNT];
#pragma unroll
  for (int k = 0; k < COUNT; ++k) {
    packed[k] = load_packed<N>(x + k * step);
  }
#pragma unroll
  for (int k = 0; k < COUNT; ++k) {
    Floats<N> values = unpack(packed[k]);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      values.at[i] = relu(norm(values.at[i], M == 1 ? 0 : i));
    }
    store(y + k * step, values);
  }
}

// Normalize x and apply ReLU. ALONG_CHANNELS: a vector's elements are neighbouring channels, not pixels.
template <class T, int N, bool ALONG_CHANNELS>
__global__ void __launch_bounds__(BLOCK_THREADS)
    bn_relu_kernel(const T* __restrict__ x, T* __restrict__ y, Channels channels, Walks walks) {
  constexpr int M = ALONG_CHANNELS ? N : 1;
  const Walk walk = start_walk<M>(walks);
  const ThreadNorm<M> norm(channels, walk.channel, walk.active);
  const int64_t step = walks.rows * walks.stride;
  int64_t at = walk.at;
  int place = walk.place;
  for (; place + (DEPTH - 1) * walks.rows < walk.end; place += DEPTH * walks.rows) {
    bn_relu<N, M, DEPTH>(x + at, y + at, step, norm);
    at += DEPTH * step;
  }
  for (; place < walk.end; place += walks.rows) {
    bn_relu<N, M, 1>(x + at, y + at, step, norm);
    at += step;
  }
}

// The gradients that flow to N normalized values. MASK: the gradient is that of the ReLU's output.
template <bool MASK, int N, int M, class T>
__device__ __forceinline__ Floats<N> flowing(const Vector<T, N>& grad, const Floats<N>& x, const ThreadNorm<M>& norm) {
  Floats<N> flow = unpack(grad);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if constexpr (MASK) {
      const float y = static_cast<float>(static_cast<T>(norm(x.at[i], M == 1 ? 0 : i)));
      flow.at[i] = relu_off(y) ? 0.0f : flow.at[i];
    }
  }
  return flow;
}

// The sums of a channel's gradient, and of it times x less its mean.
struct GradientSums {
  float plain;
  float times;

  FASTCNN_HOST_DEVICE void merge(const GradientSums& other) {
    plain += other.plain;
    times += other.times;
  }
};

template <class T, int N, bool ALONG_CHANNELS, bool MASK>
__global__ void __launch_bounds__(BLOCK_THREADS) sums_kernel(const T* __restrict__ grad, const T* __restrict__ x,
    GradientSums* __restrict__ partials, Channels channels, Walks walks) {
  constexpr int M = ALONG_CHANNELS ? N : 1;
  const Walk walk = start_walk<M>(walks);
  const ThreadNorm<M> norm(channels, walk.channel, walk.active);
  const int64_t step = walks.rows * walks.stride;
  int64_t at = walk.at;
  Floats<M> plain{}, times{};
#pragma unroll 2
  for (int place = walk.place; place < walk.end; place += walks.rows) {
    const Floats<N> values = load<N>(x + at);
    const Floats<N> flow = flowing<MASK>(load_packed<N>(grad + at), values, norm);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const int j = M == 1 ? 0 : i;
      plain.at[j] += flow.at[i];
      times.at[j] += flow.at[i] * (values.at[i] - norm.mean.at[j]);
    }
    at += step;
  }
  GradientSums all[M];
#pragma unroll
  for (int i = 0; i < M; ++i) {
    all[i] = {plain.at[i], times.at[i]};
  }
  leave_merged(all, partials, walks, walk);
}

__global__ void __launch_bounds__(1024) merge_sums_kernel(
    const GradientSums* partials, float* grad_weight, float* grad_bias, Channels channels, Walks walks) {
  const Walk walk = start_walk<1>(walks);
  const GradientSums all = merge_partials(partials, walks, walk);
  if (walk.active && walk.row == 0) {
    const float inverse = inverse_deviation(channels.variance[walk.channel], channels.eps);
    grad_bias[walk.channel] = static_cast<float>(all.plain);
    grad_weight[walk.channel] = static_cast<float>(all.times * inverse);
  }
}

// The sums whose part of the gradient the batch's own mean and variance take up, and one over the values of a channel.
struct Taken {
  const float* grad_weight;
  const float* grad_bias;
  float share;
};

// All of COUNT vectors are loaded before the first is written: dx may be the memory of grad.
template <int N, int COUNT, bool MASK, bool TRAINING, int M, class T>
__device__ __forceinline__ void input_gradient(const T* grad, const T* x, T* dx, int64_t step,
    const ThreadNorm<M>& norm, const Floats<M>& average, const Floats<M>& slope) {
  Vector<T, N> gradients[COUNT], inputs[COUNT];
#pragma unroll
  for (int k = 0; k < COUNT; ++k) {
    gradients[k] = load_packed<N>(grad + k * step);
    inputs[k] = load_packed<N>(x + k * step);
  }
#pragma unroll
  for (int k = 0; k < COUNT; ++k) {
    const Floats<N> values = unpack(inputs[k]);
    Floats<N> flow = flowing<MASK>(gradients[k], values, norm);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const int j = M == 1 ? 0 : i;
      if constexpr (TRAINING) {
        flow.at[i] -= average.at[j] + (values.at[i] - norm.mean.at[j]) * slope.at[j];
      }
      flow.at[i] *= norm.scale.at[j];
    }
    store(dx + k * step, flow);
  }
}

template <class T, int N, bool ALONG_CHANNELS, bool MASK, bool TRAINING>
__global__ void __launch_bounds__(BLOCK_THREADS, 3)  // without the 3 one spills for sm_90, at 40 registers
    gradient_kernel(const T* grad, const T* x, T* dx, Taken taken, Channels channels, Walks walks) {
  constexpr int M = ALONG_CHANNELS ? N : 1;
  const Walk walk = start_walk<M>(walks);
  const ThreadNorm<M> norm(channels, walk.channel, walk.active);
  const int64_t step = walks.rows * walks.stride;
  Floats<M> average{}, slope{};
  if constexpr (TRAINING) {
    average = load_numbers<M>(taken.grad_bias, walk.active ? walk.channel : 0, 0.0f);
    slope = load_numbers<M>(taken.grad_weight, walk.active ? walk.channel : 0, 0.0f);
#pragma unroll
    for (int i = 0; i < M; ++i) {
      average.at[i] *= taken.share;
      slope.at[i] *= taken.share * norm.inverse.at[i];
    }
  }
  int64_t at = walk.at;
  int place = walk.place;
  for (; place + (DEPTH - 1) * walks.rows < walk.end; place += DEPTH * walks.rows) {
    input_gradient<N, DEPTH, MASK, TRAINING>(grad + at, x + at, dx + at, step, norm, average, slope);
    at += DEPTH * step;
  }
  for (; place < walk.end; place += walks.rows) {
    input_gradient<N, 1, MASK, TRAINING>(grad + at, x + at, dx + at, step, norm, average, slope);
    at += step;
  }
}

// One call of normalize_backward, its tensors dense.
struct Backward {
  const Device& device;
  const Tensor& grad;
  const Tensor& x;
  Tensor& dx;
  Tensor& grad_weight;
  Tensor& grad_bias;
  Channels channels;
  Layout layout;
  bool training;
};

template <class T, int N, bool ALONG_CHANNELS, bool MASK>
void run_backward(Backward& call, const Walks& walks) {
  Merging<GradientSums> merging(call.x, walks);
  const T *grad = data<T>(call.grad), *x = data<T>(call.x);
  float *grad_weight = mutable_data<float>(call.grad_weight), *grad_bias = mutable_data<float>(call.grad_bias);
  call.device.launch(sums_kernel<T, N, ALONG_CHANNELS, MASK>, walks.blocks(), walks.threads,
      merging.shared_bytes(walks), grad, x, merging.partials(), call.channels, walks);
  call.device.launch(merge_sums_kernel, merging.walks.parts, merging.walks.threads, merging.shared_bytes(merging.walks),
      merging.partials(), grad_weight, grad_bias, call.channels, merging.walks);
  const auto kernel = call.training ? gradient_kernel<T, N, ALONG_CHANNELS, MASK, true>
                                    : gradient_kernel<T, N, ALONG_CHANNELS, MASK, false>;
  const Taken taken{grad_weight, grad_bias, 1.0f / static_cast<float>(call.layout.images * call.layout.pixels)};
  call.device.launch(
      kernel, walks.blocks(), walks.threads, 0, grad, x, mutable_data<T>(call.dx), taken, call.channels, walks);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> normalize_backward(
    const Tensor& grad, const Tensor& x, Tensor dx, const Norm& norm, bool training, bool masked) {
  const Device device(x);
  const Layout shape = layout(x, is_channels_last(x));
  Tensor grad_weight = new_numbers(x, shape.channels), grad_bias = new_numbers(x, shape.channels);
  if (x.numel() == 0) {
    return {dx, torch::stable::fill_(grad_weight, 0.0), torch::stable::fill_(grad_bias, 0.0)};
  }
  Backward call{device, grad, x, dx, grad_weight, grad_bias, Channels(norm), shape, training};
  const bool aligned = are_aligned({&grad, &x, &dx});
  with_type("batch_norm", x, [&](auto type) {
    using T = decltype(type);
    with_vectors<T>(shape, aligned, SUMS_DEPTH, MOST_SUMS, [&](auto n, auto along_channels, const Walks& walks) {
      masked ? run_backward<T, n(), along_channels(), false>(call, walks)
             : run_backward<T, n(), along_channels(), true>(call, walks);
    });
  });
  return {dx, grad_weight, grad_bias};
}

Tensor bn_relu(const Tensor& input, const Tensor& mean, const Tensor& variance, std::optional<Tensor> weight,
    std::optional<Tensor> bias, double eps) {
  const Norm norm = aligned(make_norm(input, mean, variance, weight, bias, eps));
  const bool channels_last = is_channels_last(input);
  const Tensor x = dense(input, channels_last);
  const Device device(x);
  Tensor y = new_tensor(x, x.sizes(), x.scalar_type(), channels_last);
  const bool aligned = are_aligned({&x, &y});
  with_type("batch_norm", x, [&](auto type) {
    using T = decltype(type);
    with_vectors<T>(
        layout(x, channels_last), aligned, DEPTH, MOST_BLOCKS, [&](auto n, auto along_channels, const Walks& walks) {
          device.launch(bn_relu_kernel<T, n(), along_channels()>, walks.blocks(), walks.threads, 0, data<T>(x),
              mutable_data<T>(y), Channels(norm), walks);
        });
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> bn_relu_backward(const Tensor& grad, const Tensor& input, const Tensor& mean,
    const Tensor& variance, std::optional<Tensor> weight, std::optional<Tensor> bias, double eps, bool training) {
  check_same_shape("bn_relu_backward", grad, input);
  const Norm norm = aligned(make_norm(input, mean, variance, weight, bias, eps));
  const bool channels_last = is_channels_last(input);
  const Tensor x = dense(input, channels_last);
  const Tensor dx = new_tensor(x, x.sizes(), x.scalar_type(), channels_last);
  return normalize_backward(dense(grad, channels_last), x, dx, norm, training, false);
}

}  // namespace fastcnn::cuda
