// Batch norm + ReLU + max-pool: the normalized values are never written. Backward unpools, then goes on as bn_relu's.

#include "../ops.h"
#include "batch_norm.h"
#include "launch.h"
#include "max_pool.h"
#include "pool_scan.h"
#include "pool_strips.h"
#include "vector.h"
#include "walk.h"

namespace fastcnn::cuda {
namespace {

// Normalized and rounded as values that were written would be, so that the same place wins.
template <class T, int N>
__device__ __forceinline__ Vector<T, N> normalized(const Vector<T, N>& x, const ThreadNorm<N>& norm) {
  Vector<T, N> y;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    y.at[i] = static_cast<T>(norm(static_cast<float>(x.at[i]), i));
  }
  return y;
}

// Normalize x and pool to y and codes (null if not asked for); SIDE is 0 for any window.
template <class T, int N, int SIDE>
__global__ void __launch_bounds__(BLOCK_THREADS, 2)
    bn_relu_pool_kernel(const T* __restrict__ x, T* __restrict__ y, uint8_t* __restrict__ codes, Channels channels,
        Window32 window, Plane32 plane, PlaneStrides strides, RouteSteps steps, Walks walks) {
  const Walk walk = start_walk<N>(walks);
  if (!walk.active) {
    return;
  }
  const ThreadNorm<N> norm(channels, walk.channel, true);
  const auto prepare = [&](const Vector<T, N>& values) { return normalized(values, norm); };
  pool_walk<SIDE, N>(x, y, codes, prepare, true, window, plane, strides, steps, walks, walk);
}

// NCHW, windows that lie two pixels apart.
template <class T, int SIDE, bool CODES>
__global__ void __launch_bounds__(BLOCK_THREADS) bn_relu_pool_strips_kernel(const T* __restrict__ x, T* __restrict__ y,
    uint8_t* __restrict__ codes, Channels channels, Window32 window, Plane32 plane, Strips strips) {
  const Strip strip(strips);
  if (strip.row >= strip.end) {
    return;
  }
  const ThreadNorm<1> norm(channels, strip.channel(strips), true);
  const auto prepare = [&](const Vector<T, PAIR>& values) {
    return Vector<T, PAIR>{static_cast<T>(norm(static_cast<float>(values.at[0]), 0)),
        static_cast<T>(norm(static_cast<float>(values.at[1]), 0))};
  };
  const int64_t out = int64_t{strip.plane} * (plane.out_height * plane.out_width);
  pool_strip<SIDE, CODES>(x + int64_t{strip.plane} * (plane.height * plane.width), plane.width, y + out,
      codes + (CODES ? out : 0), prepare, true, window, plane, strip.row, strip.end - strip.row,
      first_of_pair(strip.column, plane.out_width));
}

// One call, its tensors dense.
struct NormPool {
  const Device& device;
  const Tensor& x;
  Tensor& y;
  Tensor& codes;  // or empty
  Channels channels;
  Layout layout;
  Window window;
  Plane plane;
};

template <class T, int N>
void run_pool(const NormPool& call) {
  const auto& [images, channels, pixels, channels_last] = call.layout;
  uint8_t* codes = call.codes.numel() > 0 ? mutable_data<uint8_t>(call.codes) : nullptr;
  if (const int side = channels_last ? 0 : side_of_strips(call.window, call.plane); side > 0) {
    const Strips strips = make_strips(images, channels, call.plane.out_height, call.plane.out_width, 1, PAIR);
    const Walks walks = walks_of(strips);
    const auto kernel =
        codes == nullptr
            ? (side == 2 ? bn_relu_pool_strips_kernel<T, 2, false> : bn_relu_pool_strips_kernel<T, 3, false>)
            : (side == 2 ? bn_relu_pool_strips_kernel<T, 2, true> : bn_relu_pool_strips_kernel<T, 3, true>);
    call.device.launch(kernel, walks.blocks(), walks.threads, 0, data<T>(call.x), mutable_data<T>(call.y), codes,
        call.channels, narrow(call.window), narrow(call.plane), strips);
    return;
  }
  const Walks walks = make_walks(images, channels, call.plane.out_height * call.plane.out_width, channels_last, N,
      channels_last ? channels : 1, POOL_DEPTH);
  const PlaneStrides strides(call.plane.height, call.plane.width, walks.stride);
  const int side = side_of_scan(call.window, strides.image);
  const auto kernel = side == 2   ? bn_relu_pool_kernel<T, N, 2>
                      : side == 3 ? bn_relu_pool_kernel<T, N, 3>
                                  : bn_relu_pool_kernel<T, N, 0>;
  call.device.launch(kernel, walks.blocks(), walks.threads, 0, data<T>(call.x), mutable_data<T>(call.y), codes,
      call.channels, narrow(call.window), narrow(call.plane), strides,
      RouteSteps(walks, call.plane.out_height, call.plane.out_width), walks);
}

std::pair<Tensor, Tensor> norm_pool(const Tensor& input, const Norm& norm, const Window& window, bool codes) {
  STD_TORCH_CHECK(input.dim() == 4, "bn_relu_pool: expected (N, C, H, W), got ", input.dim(), " axes");
  STD_TORCH_CHECK(!codes || window.rows.size * window.columns.size <= MAX_WINDOW_PLACES,
      "bn_relu_pool: a window of more than ", MAX_WINDOW_PLACES, " places has no codes");
  const bool channels_last = is_channels_last(input);
  const Tensor x = dense(input, channels_last);
  const Device device(x);
  const Plane plane = make_plane(window, x.size(2), x.size(3));
  const std::vector<int64_t> sizes{x.size(0), x.size(1), plane.out_height, plane.out_width}, none{0};
  Tensor y = new_tensor(x, sizes, x.scalar_type(), channels_last);
  Tensor code = new_tensor(x, codes ? sizes : none, torch::headeronly::ScalarType::Byte, codes && channels_last);
  const NormPool call{device, x, y, code, Channels(norm), layout(x, channels_last), window, plane};
  const bool aligned = are_aligned({&x, &y, &code});
  with_type("bn_relu_pool", x, [&](auto type) {
    using T = decltype(type);
    aligned && channels_last && x.size(1) % WIDTH<T> == 0 ? run_pool<T, WIDTH<T>>(call) : run_pool<T, 1>(call);
  });
  return {y, code};
}

}  // namespace

Tensor bn_relu_pool(const Tensor& input, const Tensor& mean, const Tensor& variance, std::optional<Tensor> weight,
    std::optional<Tensor> bias, double eps, const Window& window) {
  return norm_pool(input, aligned(make_norm(input, mean, variance, weight, bias, eps)), window, false).first;
}

std::tuple<Tensor, Tensor> bn_relu_pool_codes(const Tensor& input, const Tensor& mean, const Tensor& variance,
    std::optional<Tensor> weight, std::optional<Tensor> bias, double eps, const Window& window) {
  return norm_pool(input, aligned(make_norm(input, mean, variance, weight, bias, eps)), window, true);
}

std::tuple<Tensor, Tensor, Tensor> bn_relu_pool_backward(const Tensor& grad, const Tensor& codes, const Tensor& input,
    const Tensor& mean, const Tensor& variance, std::optional<Tensor> weight, std::optional<Tensor> bias, double eps,
    bool training, const Window& window) {
  STD_TORCH_CHECK(input.dim() == 4 && grad.scalar_type() == input.scalar_type() && codes.dim() == 4 &&
                      codes.size(0) == input.size(0) && codes.size(1) == input.size(1),
      "bn_relu_pool_backward: gradient and codes do not fit the input");
  const Norm norm = aligned(make_norm(input, mean, variance, weight, bias, eps));
  const bool channels_last = is_channels_last(input);
  const Tensor x = dense(input, channels_last);
  const Tensor unpooled = pool_backward(grad, dense(codes, channels_last), x.size(2), x.size(3), window, false).first;
  const Tensor flow = dense(unpooled, channels_last);
  return normalize_backward(flow, x, flow, norm, training, true);
}

}  // namespace fastcnn::cuda
