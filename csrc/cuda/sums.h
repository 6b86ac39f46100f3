#pragma once
// Sums over all but the channels, in a fixed order: of each walk in registers, of a block's walks in shared memory, and
// of all blocks by one small kernel.

#include "launch.h"
#include "vector.h"
#include "walk.h"

namespace fastcnn::cuda {

// Partial sums: (rows, C) in float32, one row for each share of the places (and each image, in NCHW).
struct Partials {
  Tensor sums;
  int64_t rows;
};

inline Partials new_partials(const Tensor& like, const Walks& walks, bool wanted) {
  const int64_t channels = walks.channels, planes = walks.channels_last ? channels : walks.parts;
  const int64_t rows = wanted && channels > 0 ? walks.shares * planes / channels : 0;
  const std::vector<int64_t> sizes{rows, channels};
  return {new_tensor(like, sizes, torch::headeronly::ScalarType::Float, false), rows};
}

inline int64_t shared_bytes_of_sums(const Walks& walks, int64_t width) {
  return walks.threads * width * static_cast<int64_t>(sizeof(float));
}

// Add up the rows of a block; the total is that of row 0. Every thread of the block must come here.
template <int N>
__device__ __forceinline__ void add_rows(Floats<N>& sum, const Walks& walks, const Walk& walk) {
  const int threads = static_cast<int>(blockDim.x);
  float* mine = reinterpret_cast<float*>(shared_memory()) + threadIdx.x;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    mine[i * threads] = sum.at[i];
  }
  for (int left = walks.rows; left > 1;) {
    const int half = (left + 1) / 2;
    __syncthreads();
    if (walk.active && walk.row + half < left) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        mine[i * threads] += mine[i * threads + half * walks.lanes];
      }
    }
    left = half;
  }
#pragma unroll
  for (int i = 0; i < N; ++i) {
    sum.at[i] = mine[i * threads];
  }
}

// Leave the block's sums in its row of `partials`. Every thread of the block must come here.
template <int N>
__device__ __forceinline__ void leave_sums(Floats<N> sum, float* partials, const Walks& walks, const Walk& walk) {
  add_rows(sum, walks, walk);
  if (walk.active && walk.row == 0) {
    const int64_t width = walks.channels_last ? walks.channels : walks.parts;
    float* to = partials + walk.share * width + walk.plane + walk.offset;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      to[i] = sum.at[i];
    }
  }
}

// Add up (places, C) to (C,): 8 channels a block, as many as one sector of memory holds.
template <class T>
__global__ void __launch_bounds__(1024) add_partials_kernel(const float* partials, T* total, Walks walks) {
  const Walk walk = start_walk<1>(walks);
  Floats<1> sum{};
#pragma unroll 8
  for (int place = walk.place; place < walk.end; place += walks.rows) {
    sum.at[0] += partials[place * walks.channels + walk.channel];
  }
  add_rows(sum, walks, walk);
  if (walk.active && walk.row == 0) {
    total[walk.channel] = static_cast<T>(sum.at[0]);
  }
}

// Walks over (rows, C) by blocks of `lanes` channels each, which go over all rows.
inline Walks channel_walks(int64_t channels, int64_t rows, int64_t lanes, int64_t most_rows) {
  Walks walks{};
  walks.channels = channels;
  walks.places = walks.share = rows;
  walks.shares = walks.teams = 1;
  walks.channels_last = true;
  walks.lanes = static_cast<int>(lanes);
  walks.rows = static_cast<int>(clamp(rows, 1, most_rows));
  walks.parts = ceil_div(channels, lanes);
  walks.threads = static_cast<int>(round_up(lanes * walks.rows, WARP));
  set_divisors(walks);
  return walks;
}

// The totals (C,), or (0,) if there was nothing to sum.
inline Tensor add_partials(const Device& device, const Partials& partials, const Tensor& like, bool wanted) {
  constexpr int64_t LANES = 8, MOST_ROWS = 128;
  const int64_t channels = wanted ? partials.sums.size(1) : 0;
  const std::vector<int64_t> sizes{channels};
  Tensor total = new_tensor(like, sizes, like.scalar_type(), false);
  const Walks walks = channel_walks(channels, partials.rows, LANES, MOST_ROWS);
  with_type("add_partials", like, [&](auto type) {
    using T = decltype(type);
    device.launch(add_partials_kernel<T>, walks.parts, walks.threads, shared_bytes_of_sums(walks, 1),
        data<float>(partials.sums), mutable_data<T>(total), walks);
  });
  return total;
}

}  // namespace fastcnn::cuda
