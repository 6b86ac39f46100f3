// Addition + ReLU in one pass over memory, whatever its layout; backward masks by the output's sign.

#include "../batch_norm.h"
#include "../math/select.h"
#include "../ops.h"
#include "launch.h"
#include "vector.h"
#include "walk.h"

namespace fastcnn::cuda {
namespace {

// The sum of two values and its ReLU, or a gradient under an output's mask.
template <bool MASK>
__device__ __forceinline__ float combined(float a, float b) {
  return MASK ? (relu_off(b) ? 0.0f : a) : relu(a + b);
}

// One program computes a vector of N elements a thread; the last few go one by one.
template <class T, int N, bool MASK>
__global__ void __launch_bounds__(BLOCK_THREADS)
    combine_kernel(const T* __restrict__ a, const T* __restrict__ b, T* __restrict__ out, int64_t elements) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * BLOCK_THREADS + threadIdx.x;
  const int64_t begin = thread * N;
  if (begin + N <= elements) {
    Floats<N> first = load<N>(a + begin);
    const Floats<N> second = load<N>(b + begin);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      first.at[i] = combined<MASK>(first.at[i], second.at[i]);
    }
    store(out + begin, first);
    return;
  }
#pragma unroll 1
  for (int64_t i = begin; i < elements; ++i) {
    out[i] = static_cast<T>(combined<MASK>(static_cast<float>(a[i]), static_cast<float>(b[i])));
  }
}

template <bool MASK>
Tensor combine(const char* function, const Tensor& a, const Tensor& b) {
  check_same_shape(function, a, b);
  Tensor out = torch::stable::empty_like(MASK ? b : a);
  const Tensor first = laid_out_as(a, out), second = laid_out_as(b, out);
  const Device device(out);
  const bool aligned = are_aligned({&first, &second, &out});
  with_type(function, out, [&](auto type) {
    using T = decltype(type);
    const auto kernel = aligned ? combine_kernel<T, WIDTH<T>, MASK> : combine_kernel<T, 1, MASK>;
    const int64_t blocks = ceil_div(out.numel(), BLOCK_THREADS * (aligned ? WIDTH<T> : 1));
    device.launch(kernel, blocks, BLOCK_THREADS, 0, data<T>(first), data<T>(second), mutable_data<T>(out), out.numel());
  });
  return out;
}

}  // namespace

Tensor add_relu(const Tensor& input, const Tensor& other) { return combine<false>("add_relu", input, other); }

Tensor add_relu_backward(const Tensor& grad, const Tensor& output) {
  return combine<true>("add_relu_backward", grad, output);
}

}  // namespace fastcnn::cuda
