// Local response normalization across channels, forward and backward: lrn.h says how a tensor is shared out.

#include "lrn.h"

#include "../ops.h"
#include "lrn_backward.h"

namespace fastcnn::cuda {
namespace {

template <class T, Path PATH>
__global__ void __launch_bounds__(LRN_THREADS)
    lrn_kernel(const T* __restrict__ x, T* __restrict__ y, Runs runs, LRN norm) {
  const auto i = static_cast<int32_t>(blockIdx.x * LRN_THREADS + threadIdx.x);
  if (i < runs.count) {
    const Run run = run_at<PATH, T>(runs, i);
    store_run<PATH>(y, run, normalize_run<PATH>(x, run, norm));
  }
}

template <class T>
__global__ void __launch_bounds__(LRN_THREADS)
    lrn_elements_kernel(const T* x, T* y, Layout layout, LRN norm, int64_t elements) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * LRN_THREADS + threadIdx.x;
  if (i < elements) {
    const Factors factors = factors_at(x + i, element_at(layout, i).channel, layout.channels, step_of(layout), norm);
    y[i] = static_cast<T>(static_cast<float>(x[i]) * factors.factor);
  }
}

template <class T>
void lrn_into(const Device& device, Path path, const Tensor& x, Tensor& y, const Layout& layout, const LRN& norm) {
  const T* from = data<T>(x);
  T* to = mutable_data<T>(y);
  if (path == Path::ELEMENTS) {
    device.launch(
        lrn_elements_kernel<T>, ceil_div(x.numel(), LRN_THREADS), LRN_THREADS, 0, from, to, layout, norm, x.numel());
    return;
  }
  const Runs runs = make_runs<T>(layout);
  const auto kernel = path == Path::VECTORS ? lrn_kernel<T, Path::VECTORS> : lrn_kernel<T, Path::PLANES>;
  device.launch(kernel, runs.blocks(), LRN_THREADS, 0, from, to, runs, norm);
}

}  // namespace

Tensor lrn(const Tensor& input, int64_t size, double alpha, double beta, double k) {
  STD_TORCH_CHECK(input.dim() >= 3, "lrn: expected (N, C, *), got ", input.dim(), " axes");
  STD_TORCH_CHECK(size > 0, "lrn: expected a positive size, got ", size);
  const bool channels_last = is_channels_last(input);
  const Device device(input);
  const Tensor x = dense(input, channels_last);
  Tensor y = new_tensor(x, x.sizes(), x.scalar_type(), channels_last);
  if (y.numel() == 0) {
    return y;
  }
  const Layout shape = layout(x, channels_last);
  with_type("lrn", x, [&](auto type) {
    using T = decltype(type);
    lrn_into<T>(
        device, path_of<T>(shape, size, beta, k, x, y), x, y, shape, make_norm(size, alpha, beta, k, input.size(1)));
  });
  return y;
}

Tensor lrn_backward(const Tensor& grad, const Tensor& input, int64_t size, double alpha, double beta, double k) {
  STD_TORCH_CHECK(input.dim() >= 3 && grad.dim() == input.dim() && grad.numel() == input.numel(),
      "lrn_backward: expected a gradient of the input's shape, (N, C, *)");
  STD_TORCH_CHECK(grad.scalar_type() == input.scalar_type(), "lrn_backward: gradient and input differ in dtype");
  STD_TORCH_CHECK(size > 0, "lrn_backward: expected a positive size, got ", size);
  const bool channels_last = is_channels_last(input);
  const Device device(input);
  const Tensor x = dense(input, channels_last), from = dense(grad, channels_last);
  Tensor dx = new_tensor(x, x.sizes(), x.scalar_type(), channels_last);
  if (dx.numel() == 0) {
    return dx;
  }
  const Layout shape = layout(x, channels_last);
  with_type("lrn_backward", x, [&](auto type) {
    using T = decltype(type);
    const Path path = path_of<T>(shape, size, beta, k, x, from, dx);
    const GivenGradient<T> source{data<T>(from)};
    lrn_backward_into<T>(device, path, x, source, dx, shape, make_norm(size, alpha, beta, k, input.size(1)));
  });
  return dx;
}

}  // namespace fastcnn::cuda
