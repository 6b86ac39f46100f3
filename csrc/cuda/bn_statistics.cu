// Mean and variance of each channel in one pass: each thread keeps its own, a block merges its threads', and a small
// kernel merges the blocks', in an order that shapes alone give.

#include "../math/batch_norm.h"
#include "../ops.h"
#include "launch.h"
#include "merge.h"
#include "vector.h"
#include "vectors.h"
#include "walk.h"

namespace fastcnn::cuda {
namespace {

constexpr int DEPTH = 8, FEW = 4;  // vectors of a thread that are on their way together
// Merging a block's moments costs as much as many of its vectors.
constexpr int LEAST_DEPTH = 32;
constexpr int64_t STATISTICS_BLOCKS = 2048;

using Partial = Moments<float>;

// Take in COUNT vectors of M channels each (M is 1: of one channel), whose own moments are exact in two looks.
template <int N, int M, int COUNT, class T>
__device__ __forceinline__ void take(const T* x, int64_t step, const Floats<M>& origin, Partial (&all)[M]) {
  Vector<T, N> packed[COUNT];
#pragma unroll
  for (int k = 0; k < COUNT; ++k) {
    packed[k] = load_packed<N>(x + k * step);
  }
  constexpr int EACH = COUNT * N / M;  // values of a channel
  const float share = share_of(static_cast<float>(EACH), all[0].count + static_cast<float>(EACH));
#pragma unroll
  for (int i = 0; i < M; ++i) {
    float values[EACH], mean = 0.0f, squares = 0.0f;
#pragma unroll
    for (int j = 0; j < EACH; ++j) {
      const int k = M == 1 ? j / N : j, element = M == 1 ? j % N : i;
      values[j] = static_cast<float>(packed[k].at[element]) - origin.at[i];
      mean += values[j];
    }
    mean *= 1.0f / EACH;
#pragma unroll
    for (int j = 0; j < EACH; ++j) {
      squares += (values[j] - mean) * (values[j] - mean);
    }
    all[i].merge({mean, squares, static_cast<float>(EACH)}, share);
  }
}

// Leave the moments of x, less the first value of each channel, in a row of `partials` for each share of the places.
template <class T, int N, bool ALONG_CHANNELS>
__global__ void __launch_bounds__(BLOCK_THREADS, 2)  // without the 2 it spills for sm_80, at 64 registers
    moments_kernel(const T* __restrict__ x, Partial* __restrict__ partials, int64_t pixels, Walks walks) {
  constexpr int M = ALONG_CHANNELS ? N : 1;
  const Walk walk = start_walk<M>(walks);
  const int64_t step = walks.rows * walks.stride;
  Floats<M> origin{};
  Partial all[M] = {};
  if (walk.active) {
#pragma unroll
    for (int i = 0; i < M; ++i) {
      const int64_t first = walks.channels_last ? walk.channel + i : walk.channel * pixels;
      origin.at[i] = origin_of(static_cast<float>(x[first]));
    }
  }
  int64_t at = walk.at;
  int place = walk.place;
  for (; place + (DEPTH - 1) * walks.rows < walk.end; place += DEPTH * walks.rows) {
    take<N, M, DEPTH>(x + at, step, origin, all);
    at += DEPTH * step;
  }
  for (; place + (FEW - 1) * walks.rows < walk.end; place += FEW * walks.rows) {
    take<N, M, FEW>(x + at, step, origin, all);
    at += FEW * step;
  }
  for (; place < walk.end; place += walks.rows) {
    take<N, M, 1>(x + at, step, origin, all);
    at += step;
  }
  leave_merged(all, partials, walks, walk);
}

// Merge (places, C) to mean, biased and unbiased variance: (3, C).
template <class T>
__global__ void __launch_bounds__(1024)
    merge_moments_kernel(const Partial* partials, const T* x, float* statistics, int64_t first_stride, Walks walks) {
  const Walk walk = start_walk<1>(walks);
  const Partial all = merge_partials(partials, walks, walk);
  if (walk.active && walk.row == 0) {
    const float origin = origin_of(static_cast<float>(x[walk.channel * first_stride]));
    float* to = statistics + walk.channel;
    to[0] = all.mean + origin;
    to[walks.channels] = all.squares / all.count;
    to[2 * walks.channels] = all.squares / (all.count - 1.0f);
  }
}

}  // namespace

Tensor bn_relu_statistics(const Tensor& input) {
  STD_TORCH_CHECK(input.dim() >= 2, "batch_norm: expected (N, C, *), got ", input.dim(), " axes");
  using torch::headeronly::ScalarType;
  const bool channels_last = is_channels_last(input);
  const Tensor x = dense(input, channels_last);
  const Layout shape = layout(x, channels_last);
  const int64_t channels = shape.channels;
  const std::vector<int64_t> sizes{3, channels};
  Tensor statistics = new_tensor(x, sizes, ScalarType::Float, false);
  if (x.numel() == 0) {
    return torch::stable::fill_(statistics, 0.0);
  }
  const Device device(x);
  const bool aligned = are_aligned({&x});
  with_type("batch_norm", x, [&](auto type) {
    using T = decltype(type);
    with_vectors<T>(
        shape, aligned, LEAST_DEPTH, STATISTICS_BLOCKS,
        [&](auto n, auto along_channels, const Walks& walks) {
          Merging<Partial> merging(x, walks);
          device.launch(moments_kernel<T, n(), along_channels()>, walks.blocks(), walks.threads,
              merging.shared_bytes(walks), data<T>(x), merging.partials(), shape.pixels, walks);
          device.launch(merge_moments_kernel<T>, merging.walks.parts, merging.walks.threads,
              merging.shared_bytes(merging.walks), merging.partials(), data<T>(x), mutable_data<float>(statistics),
              channels_last ? int64_t{1} : shape.pixels, merging.walks);
        },
        LEAST_DEPTH);
  });
  return statistics;
}

}  // namespace fastcnn::cuda
