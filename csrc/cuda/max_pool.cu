// Max-pool: values and one-byte codes, after bias and ReLU if asked; max_pool_backward.cu follows the codes back.
//
// A thread computes one place of the output, for its channels. The places of a window are compared in row-major order,
// so that the first of equals wins, as in torch.

#include "max_pool.h"

#include "../ops.h"
#include "best.h"
#include "conv_relu.h"
#include "inside.h"
#include "launch.h"
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

template <bool STAGE, class T, int N>
__device__ __forceinline__ void finish(Best<T, N>& best, bool relu, T* y, uint8_t* codes, int64_t at) {
  if (STAGE && relu) {
    best.apply_relu();
  }
  best.store(y + at, codes == nullptr ? nullptr : codes + at);
}

// A window of SIDE x SIDE neighbours, all of them loaded before the first is compared.
template <int SIDE, bool STAGE, class T, int N>
__device__ __forceinline__ Best<T, N> pool_square(const T* x, int64_t image, const Inside& inside,
    const Window32& window, const Plane32& plane, int64_t stride, const Vector<T, N>& bias) {
  const int64_t corner = ((image + inside.top) * plane.width + inside.left) * stride, line = plane.width * stride;
  Vector<T, N> packed[SIDE * SIDE];
#pragma unroll
  for (int place = 0; place < SIDE * SIDE; ++place) {
    const int r = place / SIDE, s = place % SIDE;
    packed[place] = {};
    if (inside.contains(r, s)) {
      packed[place] = load_packed<N>(x + corner + r * line + s * stride);
    }
  }
  Best<T, N> best(inside.first_code(window));
#pragma unroll
  for (int place = 0; place < SIDE * SIDE; ++place) {
    if (inside.contains(place / SIDE, place % SIDE)) {
      best.template take<STAGE>(packed[place], place, bias);
    }
  }
  return best;
}

template <bool STAGE, class T, int N>
__device__ __forceinline__ Best<T, N> pool_any(const T* x, int64_t image, const Inside& inside, const Window32& window,
    const Plane32& plane, int64_t stride, const Vector<T, N>& bias) {
  Best<T, N> best(inside.first_code(window));
  for (int r = inside.row; r < inside.end_row; ++r) {
    const int64_t line = image + inside.top + r * window.rows.dilation;
    for (int s = inside.column; s < inside.end_column; ++s) {
      const int64_t pixel = line * plane.width + inside.left + s * window.columns.dilation;
      best.template take<STAGE>(load_packed<N>(x + pixel * stride), code_of(r, s, window.columns), bias);
    }
  }
  return best;
}

// Pool x to y and codes (null if not asked for); SIDE is 0 for any window. STAGE: with bias or ReLU.
template <class T, int N, int SIDE, bool STAGE>
__global__ void __launch_bounds__(BLOCK_THREADS, 3)
    pool_kernel(const T* x, T* y, uint8_t* codes, Stage<T> stage, Window32 given, Plane32 plane, Walks walks) {
  const Walk walk = start_walk<N>(walks);
  if (!walk.active) {
    return;
  }
  const Window32 window = SIDE == 0 ? given : square<SIDE>(given);
  const Vector<T, N> bias = load_bias<N>(STAGE ? stage.bias : nullptr, walk.channel);
  Route route(walks, walk, plane.out_height, plane.out_width);
  int64_t out = walk.at;
  for (int place = walk.place; place < walk.end; place += walks.rows) {
    const Inside inside(window, plane, route.at);
    const int64_t image = route.at.image * plane.height;
    Best<T, N> best;
    if constexpr (SIDE == 0) {
      best = pool_any<STAGE, T, N>(x + walk.offset, image, inside, window, plane, walks.stride, bias);
    } else {
      best = pool_square<SIDE, STAGE, T, N>(x + walk.offset, image, inside, window, plane, walks.stride, bias);
    }
    finish<STAGE>(best, stage.relu, y, codes, out);
    out += walks.rows * walks.stride;
    route.advance();
  }
}

// NCHW, 2x2 windows side by side over rows of whole vectors: one vector of each of two rows gives half a vector.
template <class T, bool STAGE>
__global__ void __launch_bounds__(BLOCK_THREADS)
    pool_pairs_kernel(const T* x, T* y, uint8_t* codes, Stage<T> stage, Plane32 plane, Walks walks) {
  constexpr int N = WIDTH<T>, HALF = N / 2;
  const Walk walk = start_walk<1>(walks);
  if (!walk.active) {
    return;
  }
  const Vector<T, HALF> bias = repeat<HALF>(load_bias<1>(STAGE ? stage.bias : nullptr, walk.channel).at[0]);
  Route route(walks, walk, plane.out_height, plane.width / N);
  int64_t out = walk.at;
  for (int place = walk.place; place < walk.end; place += walks.rows) {
    const T* corner = x + (walk.plane * plane.height + 2 * route.at.row) * plane.width + route.at.column * N;
    const Vector<T, N> lines[2] = {load_packed<N>(corner), load_packed<N>(corner + plane.width)};
    Best<T, HALF> best(0);
#pragma unroll
    for (int code = 0; code < 4; ++code) {
      Vector<T, HALF> every_second;
#pragma unroll
      for (int i = 0; i < HALF; ++i) {
        every_second.at[i] = lines[code / 2].at[2 * i + code % 2];
      }
      best.template take<STAGE>(every_second, code, bias);
    }
    finish<STAGE>(best, stage.relu, y, codes, out);
    out += walks.rows * HALF;
    route.advance();
  }
}

bool is_pairs(const Window& window, const Plane& plane, int64_t width) {
  const bool halves = window.rows.stride == 2 && window.columns.stride == 2 && window.rows.padding == 0 &&
                      window.columns.padding == 0 && plane.out_height * 2 <= plane.height;
  return is_square(window, 2) && halves && plane.width % width == 0;
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
      kernel, walks.blocks(), walks.threads, 0, data<T>(pool.x), mutable_data<T>(pool.y), codes, stage, rest..., walks);
}

template <class T, int N, bool STAGE>
void run_pool(const PoolCall& pool) {
  const auto& [images, channels, pixels, channels_last] = pool.layout;
  const Walks walks = make_walks(images, channels, pool.plane.out_height * pool.plane.out_width, channels_last, N,
      channels_last ? channels : 1, POOL_DEPTH);
  const auto kernel = is_square(pool.window, 2)   ? pool_kernel<T, N, 2, STAGE>
                      : is_square(pool.window, 3) ? pool_kernel<T, N, 3, STAGE>
                                                  : pool_kernel<T, N, 0, STAGE>;
  launch_pool<T, STAGE>(pool, walks, kernel, narrow(pool.window), narrow(pool.plane));
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
    launch_pool<T, STAGE>(pool, walks, pool_pairs_kernel<T, STAGE>, narrow(pool.plane));
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
