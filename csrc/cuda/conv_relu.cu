// Convolution + bias + ReLU: one pass over torch's bias-free convolution, or one of our kernels. Backward masks the
// gradient by the output's sign and sums the bias gradient in one pass. linear_relu shares both passes: its rows are
// the pixels of an image whose channels are contiguous.

#include "conv_relu.h"

#include "../convolution.h"
#include "../math/select.h"
#include "../ops.h"
#include "convolution.h"
#include "launch.h"
#include "pairs.h"
#include "sums.h"
#include "vector.h"
#include "vectors.h"
#include "walk.h"

namespace fastcnn::cuda {
namespace {

constexpr int BIAS_DEPTH = 4;  // vectors of a thread that are on their way together
constexpr int MASK_DEPTH = 2;  // and of each of two tensors
constexpr int SUMS_DEPTH = 8;  // of a thread at least where it leaves sums

// In NCHW, one bias for all elements of a vector.
template <int N, bool ALONG_CHANNELS, class T>
__device__ __forceinline__ Floats<N> load_bias(const T* bias, const Walk& walk) {
  if (bias == nullptr || !walk.active) {
    return {};
  }
  if constexpr (ALONG_CHANNELS) {
    return load<N>(bias + walk.channel);
  } else {
    return broadcast<N>(static_cast<float>(bias[walk.channel]));
  }
}

template <int N, int COUNT, class T>
__device__ __forceinline__ void bias_relu(T* y, int64_t step, const Floats<N>& bias) {
  Vector<T, N> packed[COUNT];
#pragma unroll
  for (int k = 0; k < COUNT; ++k) {
    packed[k] = load_packed<N>(y + k * step);
  }
#pragma unroll
  for (int k = 0; k < COUNT; ++k) {
    Floats<N> values = unpack(packed[k]);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      values.at[i] = relu(values.at[i] + bias.at[i]);
    }
    store(y + k * step, values);
  }
}

// Add bias and apply ReLU, in place. ALONG_CHANNELS: a vector's elements are neighbouring channels, not pixels.
template <class T, int N, bool ALONG_CHANNELS>
__global__ void __launch_bounds__(BLOCK_THREADS) bias_relu_kernel(T* y, const T* bias, Walks walks) {
  const Walk walk = start_walk<ALONG_CHANNELS ? N : 1>(walks);
  const Floats<N> added = load_bias<N, ALONG_CHANNELS>(bias, walk);
  const int64_t step = walks.rows * walks.stride;
  int64_t at = walk.at;
  int place = walk.place;
  for (; place + (BIAS_DEPTH - 1) * walks.rows < walk.end; place += BIAS_DEPTH * walks.rows) {
    bias_relu<N, BIAS_DEPTH>(y + at, step, added);
    at += BIAS_DEPTH * step;
  }
  for (; place < walk.end; place += walks.rows) {
    bias_relu<N, 1>(y + at, step, added);
    at += step;
  }
}

// The planes of a dense NCHW tensor.
struct Planes {
  int64_t elements;  // of the tensor
  Divisor pixels;    // of a plane
  SmallDivisor by_channels;
  int channels;
};

// The same where planes of NCHW are no whole vectors: those of the whole tensor, whose elements may be of two planes.
template <class T, int N>
__global__ void __launch_bounds__(BLOCK_THREADS) bias_relu_flat_kernel(T* y, const T* bias, Planes planes) {
  const int64_t at = (static_cast<int64_t>(blockIdx.x) * BLOCK_THREADS + threadIdx.x) * N;
  if (at >= planes.elements) {
    return;
  }
  const int64_t plane = planes.pixels.quotient(at), rest = (plane + 1) * planes.pixels.value - at;
  const auto number = static_cast<int>(plane);
  const int channel = number - planes.by_channels.quotient(number) * planes.channels;
  const int next = channel + 1 < planes.channels ? channel + 1 : 0;
  const float own = bias == nullptr ? 0.0f : static_cast<float>(bias[channel]);
  const float others = bias == nullptr ? 0.0f : static_cast<float>(bias[next]);
  if (at + N <= planes.elements) {
    Floats<N> values = load<N>(y + at);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      values.at[i] = relu(values.at[i] + (i < rest ? own : others));
    }
    store(y + at, values);
    return;
  }
#pragma unroll 1
  for (int64_t i = at; i < planes.elements; ++i) {  // the tensor's last few are of one plane
    y[i] = static_cast<T>(relu(static_cast<float>(y[i]) + own));
  }
}

template <int N, int M, int COUNT, class T>
__device__ __forceinline__ void mask(const T* grad, const T* y, T* dx, int64_t step, Floats<M>& sum) {
  Vector<T, N> gradients[COUNT], outputs[COUNT];
#pragma unroll
  for (int k = 0; k < COUNT; ++k) {
    gradients[k] = load_packed<N>(grad + k * step);
    outputs[k] = load_packed<N>(y + k * step);
  }
#pragma unroll
  for (int k = 0; k < COUNT; ++k) {
    const Vector<T, N> passed = masked(gradients[k], outputs[k]);
    const Floats<N> values = unpack(passed);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      sum.at[M == 1 ? 0 : i] += values.at[i];
    }
    store_packed(dx + k * step, passed);
  }
}

// Mask grad by the sign of y; leave the sums by channel in `partials` if it is not null.
template <class T, int N, bool ALONG_CHANNELS>
__global__ void __launch_bounds__(BLOCK_THREADS, 4)
    mask_kernel(const T* grad, const T* y, T* dx, float* partials, Walks walks) {
  constexpr int M = ALONG_CHANNELS ? N : 1;
  const Walk walk = start_walk<M>(walks);
  const int64_t step = walks.rows * walks.stride;
  int64_t at = walk.at;
  int place = walk.place;
  Floats<M> sum{};
  for (; place + (MASK_DEPTH - 1) * walks.rows < walk.end; place += MASK_DEPTH * walks.rows) {
    mask<N, M, MASK_DEPTH>(grad + at, y + at, dx + at, step, sum);
    at += MASK_DEPTH * step;
  }
  for (; place < walk.end; place += walks.rows) {
    mask<N, M, 1>(grad + at, y + at, dx + at, step, sum);
    at += step;
  }
  if (partials != nullptr) {
    leave_sums(sum, partials, walks, walk);
  }
}

// The same where planes of NCHW are no whole vectors. Each looks at all vectors that hold some of it: it writes those
// that begin in it, and adds up what is its own.
template <class T, int N>
__global__ void __launch_bounds__(BLOCK_THREADS) mask_planes_kernel(
    const T* grad, const T* y, T* dx, float* partials, int64_t elements, int64_t pixels, Walks walks) {
  const Walk walk = start_walk<1>(walks);
  const int64_t begin = walk.plane * pixels, end = begin + pixels, first = begin / N * N;
  Floats<1> sum{};
  int64_t at = first + walk.first * N;
#pragma unroll 1
  for (int place = walk.place; place < walk.end; place += walks.rows, at += walks.rows * N) {
    if (at + N <= elements) {
      const Vector<T, N> passed = masked(load_packed<N>(grad + at), load_packed<N>(y + at));
      if (at >= begin && at < end) {
        store_packed(dx + at, passed);
      }
      const Floats<N> values = unpack(passed);
      const auto from = static_cast<int>(begin - at), to = static_cast<int>(end - at);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        sum.at[0] += i >= from && i < to ? values.at[i] : 0.0f;
      }
    } else {
#pragma unroll 1
      for (int64_t i = at > begin ? at : begin; i < end; ++i) {  // the tensor's last few elements
        const Vector<T, 1> passed = masked(load_packed<1>(grad + i), load_packed<1>(y + i));
        sum.at[0] += static_cast<float>(passed.at[0]);
        dx[i] = passed.at[0];
      }
    }
  }
  if (partials != nullptr) {
    leave_sums(sum, partials, walks, walk);
  }
}

std::tuple<Tensor, Tensor> mask_gradient(const Tensor& grad, const Tensor& y, const Layout& layout, bool bias_grad) {
  const Device device(y);
  Tensor dx = new_tensor(y, y.sizes(), y.scalar_type(), y.dim() == 4 && layout.channels_last);
  const bool aligned = are_aligned({&grad, &y, &dx});
  Tensor bias;
  with_type("conv_relu_backward", y, [&](auto type) {
    using T = decltype(type);
    constexpr int64_t WHOLE = WIDTH<T>;
    if (aligned && !layout.channels_last && layout.pixels % WHOLE != 0 && layout.pixels >= WHOLE) {
      const int64_t places = ceil_div(layout.pixels + WHOLE - 1, WHOLE);  // vectors that may hold some of a plane
      const Walks walks = make_walks(layout.images, layout.channels, places, false, 1, WHOLE, SUMS_DEPTH, MOST_SUMS);
      Partials partials = new_partials(y, walks, bias_grad);
      device.launch(mask_planes_kernel<T, WHOLE>, walks.blocks(), walks.threads,
          bias_grad ? shared_bytes_of_sums(walks, 1) : 0, data<T>(grad), data<T>(y), mutable_data<T>(dx),
          bias_grad ? mutable_data<float>(partials.sums) : nullptr, y.numel(), layout.pixels, walks);
      bias = add_partials(device, partials, y, bias_grad);
      return;
    }
    with_vectors<T>(layout, aligned, SUMS_DEPTH, MOST_SUMS, [&](auto n, auto along_channels, const Walks& walks) {
      constexpr int N = n(), M = along_channels() ? N : 1;
      Partials partials = new_partials(y, walks, bias_grad);
      device.launch(mask_kernel<T, N, along_channels()>, walks.blocks(), walks.threads,
          bias_grad ? shared_bytes_of_sums(walks, M) : 0, data<T>(grad), data<T>(y), mutable_data<T>(dx),
          bias_grad ? mutable_data<float>(partials.sums) : nullptr, walks);
      bias = add_partials(device, partials, y, bias_grad);
    });
  });
  return {dx, bias};
}

}  // namespace

void bias_relu_in_place(Tensor& y, const std::optional<Tensor>& bias) {
  const std::optional<Tensor> added = dense_bias(bias, y);
  const Device device(y);
  const Layout shape = layout(y, y.dim() == 2 || is_channels_last(y));  // the features of a row are contiguous
  const bool aligned = are_aligned({&y, added ? &*added : nullptr});
  with_type("conv_relu", y, [&](auto type) {
    using T = decltype(type);
    constexpr int N = WIDTH<T>;
    if (aligned && !shape.channels_last && shape.pixels % N != 0 && shape.pixels >= N) {
      STD_TORCH_CHECK(shape.images * shape.channels < MOST_TEAMS, "fastcnn: the tensor has too many planes");
      const Planes planes{y.numel(), shape.pixels, shape.channels, static_cast<int>(shape.channels)};
      device.launch(bias_relu_flat_kernel<T, N>, ceil_div(y.numel(), BLOCK_THREADS * N), BLOCK_THREADS, 0,
          mutable_data<T>(y), added ? data<T>(*added) : nullptr, planes);
      return;
    }
    with_vectors<T>(shape, aligned, BIAS_DEPTH, MOST_BLOCKS, [&](auto n, auto along_channels, const Walks& walks) {
      device.launch(bias_relu_kernel<T, n(), along_channels()>, walks.blocks(), walks.threads, 0, mutable_data<T>(y),
          added ? data<T>(*added) : nullptr, walks);
    });
  });
}

Tensor conv_relu(const Tensor& input, const Tensor& weight, std::optional<Tensor> bias, Sizes stride, Sizes padding,
    Sizes dilation, int64_t groups, std::optional<std::string> algorithm) {
  if (algorithm == "implicit_gemm" || algorithm == "direct") {
    const auto run = algorithm == "direct" ? direct : implicit_gemm;
    return run(make_convolution(input, weight, bias, stride, padding, dilation, groups), Fused::RELU).first;
  }
  Tensor y = convolution(input, weight, std::nullopt, stride, padding, dilation, groups);
  bias_relu_in_place(y, bias);
  return y;
}

std::tuple<Tensor, Tensor> conv_relu_backward(const Tensor& grad, const Tensor& output, bool bias_grad) {
  STD_TORCH_CHECK(output.dim() == 4, "conv_relu_backward: expected (N, C, H, W), got ", output.dim(), " axes");
  check_same_shape("conv_relu_backward", grad, output);
  const bool channels_last = is_channels_last(output);
  const Tensor y = dense(output, channels_last);
  return mask_gradient(dense(grad, channels_last), y, layout(y, channels_last), bias_grad);
}

std::tuple<Tensor, Tensor> linear_relu_backward(const Tensor& grad, const Tensor& output, bool bias_grad) {
  STD_TORCH_CHECK(output.dim() == 2, "linear_relu_backward: expected (N, features), got ", output.dim(), " axes");
  check_same_shape("linear_relu_backward", grad, output);
  return mask_gradient(dense(grad, false), dense(output, false), {output.size(0), output.size(1), 1, true}, bias_grad);
}

}  // namespace fastcnn::cuda
