// Batch norm + ReLU + max-pool: the normalised values are never written. Backward unpools, then goes on as bn_relu's.

#include "../ops.h"
#include "batch_norm.h"
#include "best.h"
#include "inside.h"
#include "launch.h"
#include "max_pool.h"
#include "vector.h"
#include "walk.h"

namespace fastcnn::cuda {
namespace {

// Normalised and rounded as values that were written would be, so that the same place wins.
template <class T, int N>
__device__ __forceinline__ Vector<T, N> normalised(const Vector<T, N>& x, const ThreadNorm<N>& norm) {
  Vector<T, N> y;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    y.at[i] = static_cast<T>(norm(static_cast<float>(x.at[i]), i));
  }
  return y;
}

// A window of SIDE x SIDE neighbours, all of them loaded before the first is compared.
template <int SIDE, class T, int N>
__device__ __forceinline__ void pool_square(const T* x, int64_t image, const Inside& inside, const Plane32& plane,
    int64_t stride, const ThreadNorm<N>& norm, Best<T, N>& best) {
  const int64_t corner = ((image + inside.top) * plane.width + inside.left) * stride, line = plane.width * stride;
  Vector<T, N> packed[SIDE * SIDE];
#pragma unroll
  for (int place = 0; place < SIDE * SIDE; ++place) {
    packed[place] = {};
    if (inside.contains(place / SIDE, place % SIDE)) {
      packed[place] = load_packed<N>(x + corner + place / SIDE * line + place % SIDE * stride);
    }
  }
#pragma unroll
  for (int place = 0; place < SIDE * SIDE; ++place) {
    if (inside.contains(place / SIDE, place % SIDE)) {
      best.template take<false>(normalised(packed[place], norm), place, packed[place]);
    }
  }
}

template <class T, int N>
__device__ __forceinline__ void pool_any(const T* x, int64_t image, const Inside& inside, const Window32& window,
    const Plane32& plane, int64_t stride, const ThreadNorm<N>& norm, Best<T, N>& best) {
  for (int r = inside.row; r < inside.end_row; ++r) {
    const int64_t line = image + inside.top + r * window.rows.dilation;
    for (int s = inside.column; s < inside.end_column; ++s) {
      const int64_t pixel = line * plane.width + inside.left + s * window.columns.dilation;
      const Vector<T, N> packed = load_packed<N>(x + pixel * stride);
      best.template take<false>(normalised(packed, norm), code_of(r, s, window.columns), packed);
    }
  }
}

// Normalise x and pool to y and codes (null if not asked for); SIDE is 0 for any window.
template <class T, int N, int SIDE>
__global__ void __launch_bounds__(BLOCK_THREADS, 2) bn_relu_pool_kernel(
    const T* x, T* y, uint8_t* codes, Channels channels, Window32 given, Plane32 plane, Walks walks) {
  const Walk walk = start_walk<N>(walks);
  if (!walk.active) {
    return;
  }
  const Window32 window = SIDE == 0 ? given : square<SIDE>(given);
  const ThreadNorm<N> norm(channels, walk.channel, true);
  Route route(walks, walk, plane.out_height, plane.out_width);
  int64_t out = walk.at;
  for (int place = walk.place; place < walk.end; place += walks.rows) {
    const Inside inside(window, plane, route.at);
    const int64_t image = route.at.image * plane.height;
    Best<T, N> best(inside.first_code(window));
    if constexpr (SIDE == 0) {
      pool_any(x + walk.offset, image, inside, window, plane, walks.stride, norm, best);
    } else {
      pool_square<SIDE>(x + walk.offset, image, inside, plane, walks.stride, norm, best);
    }
    best.apply_relu();
    best.store(y + out, codes == nullptr ? nullptr : codes + out);
    out += walks.rows * walks.stride;
    route.advance();
  }
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
  const Walks walks = make_walks(images, channels, call.plane.out_height * call.plane.out_width, channels_last, N,
      channels_last ? channels : 1, POOL_DEPTH);
  const auto kernel = is_square(call.window, 2)   ? bn_relu_pool_kernel<T, N, 2>
                      : is_square(call.window, 3) ? bn_relu_pool_kernel<T, N, 3>
                                                  : bn_relu_pool_kernel<T, N, 0>;
  uint8_t* codes = call.codes.numel() > 0 ? mutable_data<uint8_t>(call.codes) : nullptr;
  call.device.launch(kernel, walks.blocks(), walks.threads, 0, data<T>(call.x), mutable_data<T>(call.y), codes,
      call.channels, narrow(call.window), narrow(call.plane), walks);
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
  return norm_pool(input, make_norm(input, mean, variance, weight, bias, eps), window, false).first;
}

std::tuple<Tensor, Tensor> bn_relu_pool_codes(const Tensor& input, const Tensor& mean, const Tensor& variance,
    std::optional<Tensor> weight, std::optional<Tensor> bias, double eps, const Window& window) {
  return norm_pool(input, make_norm(input, mean, variance, weight, bias, eps), window, true);
}

std::tuple<Tensor, Tensor, Tensor> bn_relu_pool_backward(const Tensor& grad, const Tensor& codes, const Tensor& input,
    const Tensor& mean, const Tensor& variance, std::optional<Tensor> weight, std::optional<Tensor> bias, double eps,
    bool training, const Window& window) {
  STD_TORCH_CHECK(input.dim() == 4 && grad.scalar_type() == input.scalar_type() && codes.dim() == 4 &&
                      codes.size(0) == input.size(0) && codes.size(1) == input.size(1),
      "bn_relu_pool_backward: gradient and codes do not fit the input");
  const Norm norm = make_norm(input, mean, variance, weight, bias, eps);
  const bool channels_last = is_channels_last(input);
  const Tensor x = dense(input, channels_last);
  const Tensor unpooled = pool_backward(grad, dense(codes, channels_last), x.size(2), x.size(3), window, false).first;
  const Tensor flow = dense(unpooled, channels_last);
  return normalise_backward(flow, x, flow, norm, training, true);
}

}  // namespace fastcnn::cuda
