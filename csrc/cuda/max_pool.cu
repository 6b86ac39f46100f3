// Max-pool: values and one-byte codes, after bias and ReLU if asked; max_pool_backward.cu follows the codes back.
//
// A thread computes one place of the output, for its channels; in NCHW several (pool_strips.h). The places of a window
// are compared in row-major order, so that the first of equals wins, as in torch.

#include "max_pool.h"

#include "../ops.h"
#include "conv_relu.h"
#include "launch.h"
#include "pool_scan.h"
#include "pool_strips.h"
#include "vector.h"
#include "walk.h"

namespace fastcnn::cuda {
namespace {

// What happens to values before they are compared, and to the winner.
template <class T>
struct Stage {
  const T* bias;  // may be null
  bool relu;
};

template <int N, class T>
__device__ __forceinline__ Vector<T, N> repeat(T element) {
  Vector<T, N> elements;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    elements.at[i] = element;
  }
  return elements;
}

// Adding negative zero changes no value.
template <int N, class T>
__device__ __forceinline__ Vector<T, N> load_bias(const T* bias, int64_t channel) {
  return bias == nullptr ? repeat<N>(static_cast<T>(-0.0f)) : load_packed<N>(bias + channel);
}

// Pool x to y and codes (null if not asked for); SIDE is 0 for any window. STAGE: with bias or ReLU.
template <class T, int N, int SIDE, bool STAGE>
__global__ void __launch_bounds__(BLOCK_THREADS, 3)
    pool_kernel(const T* __restrict__ x, T* __restrict__ y, uint8_t* __restrict__ codes, Stage<T> stage,
        Window32 window, Plane32 plane, PlaneStrides strides, RouteSteps steps, Walks walks) {
  const Walk walk = start_walk<N>(walks);
  if (!walk.active) {
    return;
  }
  if constexpr (STAGE) {
    const Vector<T, N> bias = load_bias<N>(stage.bias, walk.channel);
    const auto prepare = [&](const Vector<T, N>& values) { return add(values, bias); };
    pool_walk<SIDE, N>(x, y, codes, prepare, stage.relu, window, plane, strides, steps, walks, walk);
  } else {
    const auto prepare = [](const Vector<T, N>& values) { return values; };
    pool_walk<SIDE, N>(x, y, codes, prepare, false, window, plane, strides, steps, walks, walk);
  }
}

// NCHW, windows that lie two pixels apart.
template <class T, int SIDE, bool STAGE, bool CODES>
__global__ void __launch_bounds__(BLOCK_THREADS) pool_strips_kernel(const T* __restrict__ x, T* __restrict__ y,
    uint8_t* __restrict__ codes, Stage<T> stage, Window32 window, Plane32 plane, Strips strips) {
  const Strip strip(strips);
  if (strip.row >= strip.end) {
    return;
  }
  const T* image = x + int64_t{strip.plane} * (plane.height * plane.width);
  const int64_t out = int64_t{strip.plane} * (plane.out_height * plane.out_width);
  const int column = first_of_pair(strip.column, plane.out_width);
  if constexpr (STAGE) {
    const Vector<T, PAIR> bias = repeat<PAIR>(load_bias<1>(stage.bias, strip.channel(strips)).at[0]);
    const auto prepare = [&](const Vector<T, PAIR>& values) { return add(values, bias); };
    pool_strip<SIDE, CODES>(image, plane.width, y + out, codes + (CODES ? out : 0), prepare, stage.relu, window, plane,
        strip.row, strip.end - strip.row, column);
  } else {
    const auto prepare = [](const Vector<T, PAIR>& values) { return values; };
    pool_strip<SIDE, CODES>(image, plane.width, y + out, codes + (CODES ? out : 0), prepare, false, window, plane,
        strip.row, strip.end - strip.row, column);
  }
}

// NCHW, 2x2 windows side by side over rows of whole vectors: one vector of each of two rows gives half a vector.
template <class T, bool STAGE>
__global__ void __launch_bounds__(BLOCK_THREADS) pool_pairs_kernel(const T* __restrict__ x, T* __restrict__ y,
    uint8_t* __restrict__ codes, Stage<T> stage, Plane32 plane, RouteSteps steps, Walks walks) {
  constexpr int N = WIDTH<T>, HALF = N / 2;
  const Walk walk = start_walk<1>(walks);
  if (!walk.active) {
    return;
  }
  const Vector<T, HALF> bias = repeat<HALF>(load_bias<1>(STAGE ? stage.bias : nullptr, walk.channel).at[0]);
  const T* image = x + walk.plane * plane.height * plane.width;
  Route route(walks, walk, steps);
  int64_t out = walk.at;
  for (int place = walk.place; place < walk.end; place += walks.rows) {
    const T* corner = image + 2 * route.at.row * plane.width + route.at.column * N;
    const Vector<T, N> lines[2] = {load_packed<N>(corner), load_packed<N>(corner + plane.width)};
    Vector<T, HALF> places[4];
#pragma unroll
    for (int code = 0; code < 4; ++code) {
#pragma unroll
      for (int i = 0; i < HALF; ++i) {
        places[code].at[i] = lines[code / 2].at[2 * i + code % 2];
      }
      places[code] = STAGE ? add(places[code], bias) : places[code];
    }
    Best<T, HALF> best = best_of(places, codes != nullptr);
    if (STAGE && stage.relu) {
      best.apply_relu();
    }
    store_packed(y + out, best.values());
    if (codes != nullptr) {
      store_packed(codes + out, best.codes());
    }
    out += walks.rows * HALF;
    route.advance();
  }
}

bool is_pairs(const Window& window, const Plane& plane, int64_t width) {
  const bool halves = window.rows.stride == 2 && window.columns.stride == 2 && window.rows.padding == 0 &&
                      window.columns.padding == 0 && plane.out_height * 2 <= plane.height;
  return is_square(window, 2) && halves && plane.width % width == 0 &&
         plane.out_height * (plane.width / width) >= BLOCK_THREADS;  // of small planes strips start with less
}

// One call of pool(), its tensors dense.
struct PoolCall {
  const Device& device;
  const Tensor& x;
  const std::optional<Tensor>& bias;
  Tensor& y;
  Tensor& codes;  // or empty
  Layout layout;
  Window window;
  Plane plane;
  bool relu;
  bool aligned;
};

template <class T, bool STAGE, class Kernel, class... Rest>
void launch_pool(const PoolCall& pool, const Walks& walks, Kernel kernel, const Rest&... rest) {
  const Stage<T> stage{pool.bias ? data<T>(*pool.bias) : nullptr, pool.relu};
  uint8_t* codes = pool.codes.numel() > 0 ? mutable_data<uint8_t>(pool.codes) : nullptr;
  pool.device.launch(
      kernel, walks.blocks(), walks.threads, 0, data<T>(pool.x), mutable_data<T>(pool.y), codes, stage, rest...);
}

template <class T, bool STAGE, int SIDE>
void run_strips(const PoolCall& pool) {
  const auto& [images, channels, pixels, channels_last] = pool.layout;
  const Strips strips = make_strips(images, channels, pool.plane.out_height, pool.plane.out_width, 1, PAIR);
  const auto kernel =
      pool.codes.numel() > 0 ? pool_strips_kernel<T, SIDE, STAGE, true> : pool_strips_kernel<T, SIDE, STAGE, false>;
  launch_pool<T, STAGE>(pool, walks_of(strips), kernel, narrow(pool.window), narrow(pool.plane), strips);
}

template <class T, int N, bool STAGE>
void run_pool(const PoolCall& pool) {
  const auto& [images, channels, pixels, channels_last] = pool.layout;
  const Walks walks = make_walks(images, channels, pool.plane.out_height * pool.plane.out_width, channels_last, N,
      channels_last ? channels : 1, POOL_DEPTH);
  const PlaneStrides strides(pool.plane.height, pool.plane.width, walks.stride);
  const int side = side_of_scan(pool.window, strides.image);
  const auto kernel = side == 2   ? pool_kernel<T, N, 2, STAGE>
                      : side == 3 ? pool_kernel<T, N, 3, STAGE>
                                  : pool_kernel<T, N, 0, STAGE>;
  launch_pool<T, STAGE>(pool, walks, kernel, narrow(pool.window), narrow(pool.plane), strides,
      RouteSteps(walks, pool.plane.out_height, pool.plane.out_width), walks);
}

template <class T, bool STAGE>
void choose_pool(const PoolCall& pool) {
  constexpr int N = WIDTH<T>;
  const auto& [images, channels, pixels, channels_last] = pool.layout;
  if (pool.aligned && channels_last && channels % N == 0) {
    run_pool<T, N, STAGE>(pool);
  } else if (pool.aligned && !channels_last && is_pairs(pool.window, pool.plane, N)) {
    const int64_t places = pool.plane.out_height * (pool.plane.width / N);
    const Walks walks = make_walks(images, channels, places, false, 1, N / 2, POOL_DEPTH);
    launch_pool<T, STAGE>(pool, walks, pool_pairs_kernel<T, STAGE>, narrow(pool.plane),
        RouteSteps(walks, pool.plane.out_height, pool.plane.width / N), walks);
  } else if (const int side = channels_last ? 0 : side_of_strips(pool.window, pool.plane); side > 0) {
    side == 2 ? run_strips<T, STAGE, 2>(pool) : run_strips<T, STAGE, 3>(pool);
  } else {
    run_pool<T, 1, STAGE>(pool);
  }
}

}  // namespace

std::pair<Tensor, Tensor> pool(
    const Tensor& input, const std::optional<Tensor>& bias, const Window& window, bool relu, bool codes) {
  STD_TORCH_CHECK(input.dim() == 4, "max_pool: expected (N, C, H, W), got ", input.dim(), " axes");
  STD_TORCH_CHECK(!codes || window.rows.size * window.columns.size <= MAX_WINDOW_PLACES,
      "max_pool: a window of more than ", MAX_WINDOW_PLACES, " places has no codes");
  const bool channels_last = is_channels_last(input);
  const Tensor x = dense(input, channels_last);
  const std::optional<Tensor> added = dense_bias(bias, x);
  const Plane plane = make_plane(window, x.size(2), x.size(3));
  const std::vector<int64_t> sizes{x.size(0), x.size(1), plane.out_height, plane.out_width}, none{0};
  const Device device(x);
  Tensor y = new_tensor(x, sizes, x.scalar_type(), channels_last);
  Tensor code = new_tensor(x, codes ? sizes : none, torch::headeronly::ScalarType::Byte, codes && channels_last);
  const bool aligned = are_aligned({&x, &y, &code, added ? &*added : nullptr});
  const PoolCall call{device, x, added, y, code, layout(x, channels_last), window, plane, relu, aligned};
  with_type("max_pool", x, [&](auto type) {
    using T = decltype(type);
    added || relu ? choose_pool<T, true>(call) : choose_pool<T, false>(call);
  });
  return {y, code};
}

Tensor max_pool(const Tensor& input, const Window& window) {
  return pool(input, std::nullopt, window, false, false).first;
}

std::tuple<Tensor, Tensor> max_pool_codes(const Tensor& input, const Window& window) {
  return pool(input, std::nullopt, window, false, true);
}

}  // namespace fastcnn::cuda
