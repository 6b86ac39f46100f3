#pragma once
// Merging what the threads of a block have found, by channel and in a fixed order; as sums.h does for float32 sums.

#include "launch.h"
#include "sums.h"
#include "walk.h"

namespace fastcnn::cuda {

constexpr int64_t MERGE_LANES = 8, MERGE_ROWS = 128;  // of the kernels that merge the blocks' results

// Merge the rows of a block; row 0 then holds the block's. Every thread of the block must come here.
template <class Partial, int M>
__device__ __forceinline__ void merge_rows(Partial (&all)[M], const Walks& walks, const Walk& walk) {
  Partial* mine = reinterpret_cast<Partial*>(shared_memory()) + threadIdx.x;
#pragma unroll
  for (int i = 0; i < M; ++i) {  // shared memory is for one channel of each thread
    __syncthreads();
    *mine = all[i];
    for (int left = walks.rows; left > 1;) {
      const int half = (left + 1) / 2;
      __syncthreads();
      if (walk.active && walk.row + half < left) {
        mine->merge(mine[half * walks.lanes]);
      }
      left = half;
    }
    all[i] = *mine;
  }
}

// Merge the rows of a block and leave the result in its row of `partials`: (rows, C).
template <class Partial, int M>
__device__ __forceinline__ void leave_merged(
    Partial (&all)[M], Partial* partials, const Walks& walks, const Walk& walk) {
  merge_rows(all, walks, walk);
  if (walk.active && walk.row == 0) {
    const int64_t width = walks.channels_last ? walks.channels : walks.parts;
    Partial* to = partials + walk.share * width + walk.plane + walk.offset;
#pragma unroll
    for (int i = 0; i < M; ++i) {
      to[i] = all[i];
    }
  }
}

// Merge (rows, C) of `partials`; the result is that of row 0. Every thread of the block must come here.
template <class Partial>
__device__ __forceinline__ Partial merge_partials(const Partial* partials, const Walks& walks, const Walk& walk) {
  Partial all[1] = {};
#pragma unroll 4
  for (int place = walk.place; place < walk.end; place += walks.rows) {
    all[0].merge(partials[place * walks.channels + walk.channel]);
  }
  merge_rows(all, walks, walk);
  return all[0];
}

// Room for partial results, (rows, C), and the walks that merge them.
template <class Partial>
struct Merging {
  int64_t rows;
  Tensor memory;
  Walks walks;

  Merging(const Tensor& like, const Walks& from)
      : rows(from.channels_last ? from.shares : from.shares * from.parts / from.channels),
        memory(allocate(like, rows * from.channels)),
        walks(channel_walks(from.channels, rows, MERGE_LANES, MERGE_ROWS)) {}

  Partial* partials() { return static_cast<Partial*>(memory.mutable_data_ptr()); }
  static int64_t shared_bytes(const Walks& walks) { return walks.threads * static_cast<int64_t>(sizeof(Partial)); }

 private:
  static Tensor allocate(const Tensor& like, int64_t count) {
    const std::vector<int64_t> sizes{count * static_cast<int64_t>(sizeof(Partial) / sizeof(float))};
    return new_tensor(like, sizes, torch::headeronly::ScalarType::Float, false);
  }
};

}  // namespace fastcnn::cuda
