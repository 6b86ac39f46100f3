// Addition + ReLU in one pass over memory, whatever its layout; backward masks by the output's sign.

#include "../batch_norm.h"
#include "../math/select.h"
#include "../ops.h"
#include "launch.h"
#include "vector.h"
#include "walk.h"

namespace fastcnn::cuda {
namespace {

constexpr int ELEMENTS = 8;  // of a thread
constexpr int BLOCK = BLOCK_THREADS * ELEMENTS;

// The sum of two values and its ReLU, or a gradient under an output's mask.
template <bool MASK, class T>
__device__ __forceinline__ T combined(T a, T b) {
  if constexpr (MASK) {
    return relu_off(static_cast<float>(b)) ? static_cast<T>(0.0f) : a;
  }
  return static_cast<T>(relu(static_cast<float>(a) + static_cast<float>(b)));
}

// A thread computes eight elements, in vectors of N that lie a block's width apart; what is left after the whole blocks
// goes one by one.
template <class T, int N, bool MASK>
__global__ void __launch_bounds__(BLOCK_THREADS) combine_kernel(
    const T* __restrict__ a, const T* __restrict__ b, T* __restrict__ out, uint32_t whole, uint32_t rest) {
  constexpr uint32_t VECTORS = ELEMENTS / N;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * BLOCK;
  a += begin;
  b += begin;
  out += begin;
  if (blockIdx.x < whole) {
    Vector<T, N> first[VECTORS], second[VECTORS];
#pragma unroll
    for (uint32_t k = 0; k < VECTORS; ++k) {
      const uint32_t at = (k * BLOCK_THREADS + threadIdx.x) * N;
      first[k] = load_packed<N>(a + at);
      second[k] = load_packed<N>(b + at);
    }
#pragma unroll
    for (uint32_t k = 0; k < VECTORS; ++k) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        first[k].at[i] = combined<MASK>(first[k].at[i], second[k].at[i]);
      }
      store_packed(out + (k * BLOCK_THREADS + threadIdx.x) * N, first[k]);
    }
    return;
  }
#pragma unroll 1
  for (uint32_t i = threadIdx.x; i < rest; i += BLOCK_THREADS) {
    out[i] = combined<MASK>(a[i], b[i]);
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
    const int64_t elements = out.numel();
    device.launch(kernel, ceil_div(elements, BLOCK), BLOCK_THREADS, 0, data<T>(first), data<T>(second),
        mutable_data<T>(out), static_cast<uint32_t>(elements / BLOCK), static_cast<uint32_t>(elements % BLOCK));
  });
  return out;
}

}  // namespace

Tensor add_relu(const Tensor& input, const Tensor& other) { return combine<false>("add_relu", input, other); }

Tensor add_relu_backward(const Tensor& grad, const Tensor& output) {
  return combine<true>("add_relu_backward", grad, output);
}

}  // namespace fastcnn::cuda
