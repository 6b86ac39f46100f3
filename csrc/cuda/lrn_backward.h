#pragma once
// LRN's backward: dx = grad * scale ** -beta - 2 alpha beta * x * (the sum of `through` over the windows that hold x),
// through = grad * x * scale ** (-beta - 1). The scale is recomputed. The gradient comes from a source: a tensor, or a
// max-pool's gradient and codes.
//
// A run recomputes `through` of the two channels on either side; element by element, it is a tensor of its own.

#include "launch.h"
#include "lrn.h"

namespace fastcnn::cuda {

// The gradient is a tensor of x's layout.
template <class T>
struct GivenGradient {
  const T* grad;

  template <Path PATH>
  __device__ __forceinline__ Values<float, RUN<T> + 2 * REACH> of_run(const Run& run) const {
    return load_run<PATH, T, REACH>(grad, run);
  }
  __device__ __forceinline__ float of_element(int64_t i, const Element&, const Layout&) const {
    return static_cast<float>(grad[i]);
  }
};

// The gradient of a run of x, given that of its output; both have their halo.
template <class T>
__device__ __forceinline__ Values<float, RUN<T>> run_gradient(
    const LRN& norm, const Values<float, RUN<T> + 4 * REACH>& x, const Values<float, RUN<T> + 2 * REACH>& grad) {
  constexpr int LENGTH = RUN<T> + 2 * REACH;
  const Values<float, LENGTH> scale = scales<T>(norm, x);
  Values<float, LENGTH> own, through;  // what is no channel has neither gradient nor value, and hands nothing on
#pragma unroll
  for (int j = 0; j < LENGTH; ++j) {
    const Flow flow = usual_flow<T>(scale.at[j], grad.at[j], x.at[j + REACH]);
    own.at[j] = flow.own;
    through.at[j] = flow.through;
  }
  Values<float, RUN<T>> result = window_sums(through);
  const float strength = -2.0f * norm.alpha * norm.beta;
#pragma unroll
  for (int j = 0; j < RUN<T>; ++j) {
    result.at[j] = multiply_add(strength * x.at[j + 2 * REACH], result.at[j], own.at[j + REACH]);
  }
  return result;
}

template <class T, Path PATH, class Source>
__global__ void __launch_bounds__(LRN_THREADS)
    lrn_backward_kernel(const T* __restrict__ x, Source source, T* __restrict__ dx, Runs runs, LRN norm) {
  const auto i = static_cast<int32_t>(blockIdx.x * LRN_THREADS + threadIdx.x);
  if (i < runs.count) {
    const Run run = run_at<PATH, T>(runs, i);
    const auto values = load_run<PATH, T, 2 * REACH>(x, run);
    store_run<PATH>(dx, run, run_gradient<T>(norm, values, source.template of_run<PATH>(run)));
  }
}

template <class T, class Source>
__global__ void __launch_bounds__(LRN_THREADS)
    lrn_through_kernel(const T* x, Source source, float* through, Layout layout, LRN norm, int64_t elements) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * LRN_THREADS + threadIdx.x;
  if (i >= elements) {
    return;
  }
  const Element element = element_at(layout, i);
  const float grad = source.of_element(i, element, layout);
  const Factors factors = factors_at(x + i, element.channel, layout.channels, step_of(layout), norm);
  through[i] = grad * static_cast<float>(x[i]) * factors.next;
}

template <class T, class Source>
__global__ void __launch_bounds__(LRN_THREADS) lrn_gradient_kernel(
    const T* x, Source source, const float* through, T* dx, Layout layout, LRN norm, int64_t elements) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * LRN_THREADS + threadIdx.x;
  if (i >= elements) {
    return;
  }
  const Element element = element_at(layout, i);
  const int64_t step = step_of(layout);
  const float grad = source.of_element(i, element, layout);
  const Reach holders = reach((norm.size - 1) / 2, norm.size, element.channel, layout.channels);
  float sum = 0.0f;
  for (int64_t j = holders.first; j < holders.end; ++j) {
    sum += through[i + j * step];
  }
  const float factor = factors_at(x + i, element.channel, layout.channels, step, norm).factor;
  dx[i] = static_cast<T>(lrn_gradient(norm, grad, static_cast<float>(x[i]), factor, sum));
}

// Fill dx, of x's layout.
template <class T, class Source>
void lrn_backward_into(const Device& device, Path path, const Tensor& x, const Source& source, Tensor& dx,
    const Layout& layout, const LRN& norm) {
  const T* from = data<T>(x);
  T* to = mutable_data<T>(dx);
  if (path == Path::ELEMENTS) {
    const int64_t elements = x.numel(), blocks = ceil_div(elements, LRN_THREADS);
    Tensor kept = new_tensor(x, x.sizes(), torch::headeronly::ScalarType::Float, layout.channels_last);
    auto* through = mutable_data<float>(kept);
    device.launch(lrn_through_kernel<T, Source>, blocks, LRN_THREADS, 0, from, source, through, layout, norm, elements);
    device.launch(
        lrn_gradient_kernel<T, Source>, blocks, LRN_THREADS, 0, from, source, through, to, layout, norm, elements);
    return;
  }
  const Runs runs = make_runs<T>(layout);
  const auto kernel = path == Path::VECTORS ? lrn_backward_kernel<T, Path::VECTORS, Source>
                                            : lrn_backward_kernel<T, Path::PLANES, Source>;
  device.launch(kernel, runs.blocks(), LRN_THREADS, 0, from, source, to, runs, norm);
}

}  // namespace fastcnn::cuda
