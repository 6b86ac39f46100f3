#pragma once
// A convolution as a matrix product by tensor cores: pixels (M) times the output channels of a group (N), summed over
// K, the window's places and the group's input channels. Here: the problem, how one block's operands come to shared
// memory, and their product. The matrix of pixels is never stored: its rows are read straight from the image.

#include <bit>
#include <type_traits>

#include "../math/window.h"
#include "device.h"
#include "vector.h"

namespace fastcnn::cuda {

// One axis of the convolution's window.
struct Steps {
  int size;
  int stride;
  int padding;
  int dilation;
};

template <class T>
struct Gemm {
  const T* input;   // (N, H, W, C)
  const T* weight;  // (C_out, R, S, C / groups)
  const T* bias;    // (C_out,) or null
  T* output;        // (N, C_out, OH, OW) in either layout
  uint8_t* codes;   // as the output, or null
  int height, width, channels;
  Steps rows, columns;
  int groups, group_in, group_out;
  int slice;         // input channels that are summed over the whole window before the next ones; divides group_in
  int tiles_n;       // tiles that hold a group's output channels
  int64_t places;    // output pixels, after the pool if there is one
  int image_places;  // of one image
  int row_places;    // of one row
  bool pooled;       // four rows of M are the window of one place, in order; else a row is a place
  bool channels_last;
  bool wide_stores;  // the output's channels can be stored 16 bytes at a time
};

// What a block computes: M rows by N channels, split among its warps. STAGES buffers of K are in flight.
template <int M_, int N_, int WARPS_M_, int WARPS_N_, int STAGES_, int BLOCKS_>
struct GemmTile {
  static constexpr int M = M_, N = N_, WARPS_M = WARPS_M_, WARPS_N = WARPS_N_, STAGES = STAGES_;
  static constexpr int BLOCKS = BLOCKS_;  // that share a multiprocessor's registers
  static constexpr int THREADS = WARPS_M * WARPS_N * WARP;
  static constexpr int WARP_M = M / WARPS_M, WARP_N = N / WARPS_N;
  static constexpr int ROW_BYTES = 64;  // of K in one stage: two steps of the matrix instruction
  static constexpr int ROW_CHUNKS = ROW_BYTES / 16;
  static constexpr int THREAD_ROWS = THREADS / ROW_CHUNKS;  // rows that the block's threads copy at a time
  static constexpr int COPIES_M = M / THREAD_ROWS, COPIES_N = N / THREAD_ROWS;
  static constexpr int STAGE_BYTES = (M + N) * ROW_BYTES;
  static constexpr int SHARED_BYTES = STAGES * STAGE_BYTES;
  static_assert(WARP_M % 16 == 0 && WARP_N % 16 == 0 && M % THREAD_ROWS == 0 && N % THREAD_ROWS == 0);
};

// Where a 16-byte chunk of a row lies in a stage. Two rows fill all banks once; the order of a row's chunks changes
// with every second row, so that the chunks of eight rows that ldmatrix reads together are in different banks.
__device__ __forceinline__ int chunk_at(int row, int chunk) { return row * 64 + (chunk ^ (row >> 1 & 3)) * 16; }

// A block's tile: rows from the first place on, and channels from `channel` on, within a group.
template <class T>
struct Corner {
  int group, channel;
  int64_t place;  // the first
  int64_t image;  // of the first place
  int inside;     // where the first place is in its image

  // Neighbouring blocks share pixels, which many blocks use once; the weights, which all use, stay in the cache anyway.
  __device__ __forceinline__ Corner(const Gemm<T>& gemm, int tile_m, int tile_n) {
    const int index = static_cast<int>(blockIdx.x);
    const int row = index / gemm.tiles_n;
    channel = index % gemm.tiles_n * tile_n;
    group = row % gemm.groups;
    place = static_cast<int64_t>(row / gemm.groups) * (gemm.pooled ? tile_m / 4 : tile_m);
    image = place / gemm.image_places;
    inside = static_cast<int>(place % gemm.image_places);
  }
};

// A thread's way through K, whose order is: slice of channels, row and column of the window, channel within the slice.
struct KWalk {
  int slice = 0, row = 0, column = 0, channel = 0;

  template <class T>
  __device__ __forceinline__ void advance(const Gemm<T>& gemm, int elements) {
    channel += elements;
    while (channel >= gemm.slice) {
      channel -= gemm.slice;
      if (++column == gemm.columns.size) {
        column = 0;
        if (++row == gemm.rows.size) {
          row = 0;
          slice += gemm.slice;
        }
      }
    }
  }
};

// Copies a block's operands to shared memory, stage after stage. A thread has one chunk of K in every THREAD_ROWS-th
// row, of pixels and of weights. CHUNK is the elements that are copied at once: 16 bytes of them, or one.
template <class T, class TILE, int CHUNK>
class OperandLoader {
 public:
  __device__ __forceinline__ OperandLoader(const Gemm<T>& gemm, const Corner<T>& corner) : gemm_(gemm) {
    image_ = gemm.input + corner.image * gemm.height * gemm.width * gemm.channels + corner.group * gemm.group_in;
    const int thread = static_cast<int>(threadIdx.x);
    const int row = thread / TILE::ROW_CHUNKS, chunk = thread % TILE::ROW_CHUNKS;
    target_ = chunk_at(row, chunk);
    walk_.advance(gemm, chunk * WIDTH<T>);
#pragma unroll
    for (int i = 0; i < TILE::COPIES_M; ++i) {
      find_pixel(corner, row + i * TILE::THREAD_ROWS, i);
    }
#pragma unroll
    for (int i = 0; i < TILE::COPIES_N; ++i) {
      find_weights(corner, row + i * TILE::THREAD_ROWS, i);
    }
  }

  // Start copying the next K elements of all rows to a stage, or zeros where there are none.
  __device__ __forceinline__ void copy(unsigned char* stage) {
    unsigned char* to = stage + target_;
    if constexpr (CHUNK == 1) {
      copy_elements(to);
    } else {
      copy_chunks(to);
      walk_.advance(gemm_, TILE::ROW_CHUNKS * WIDTH<T>);
    }
  }

 private:
  // The input pixel under the window's first place, for one row of M.
  __device__ __forceinline__ void find_pixel(const Corner<T>& corner, int row, int i) {
    const int step = gemm_.pooled ? row / 4 : row;
    const int inside = corner.inside + step;
    const int image = inside / gemm_.image_places, place = inside % gemm_.image_places;
    int y = place / gemm_.row_places, x = place % gemm_.row_places;
    if (gemm_.pooled) {
      y = y * 2 + row % 4 / 2;
      x = x * 2 + row % 2;
    }
    const int top = y * gemm_.rows.stride - gemm_.rows.padding;
    const bool exists = corner.place + step < gemm_.places;
    top_[i] = exists ? top : NOWHERE;
    left_[i] = x * gemm_.columns.stride - gemm_.columns.padding;
    pixel_[i] = exists ? ((image * gemm_.height + top) * gemm_.width + left_[i]) * gemm_.channels : 0;
  }

  // The weights of one output channel; where there are no more, those of the last, whose products nobody stores.
  __device__ __forceinline__ void find_weights(const Corner<T>& corner, int row, int i) {
    const int last = gemm_.group_out - 1, channel = corner.channel + row;
    weight_[i] = (corner.group * gemm_.group_out + (channel < last ? channel : last)) * gemm_.rows.size *
                 gemm_.columns.size * gemm_.group_in;
  }

  // What is at the current place of the walk: is it inside K, where from a row's start, how far from the first pixel.
  struct Here {
    bool exists;
    int down, right;
    int pixel, weight;
  };

  __device__ __forceinline__ Here here() const {
    const int channel = walk_.slice + walk_.channel;
    const int down = walk_.row * gemm_.rows.dilation, right = walk_.column * gemm_.columns.dilation;
    return {walk_.slice < gemm_.group_in, down, right, (down * gemm_.width + right) * gemm_.channels + channel,
        (walk_.row * gemm_.columns.size + walk_.column) * gemm_.group_in + channel};
  }

  __device__ __forceinline__ bool has_pixel(const Here& here, int i) const {
    return here.exists & (static_cast<unsigned>(top_[i] + here.down) < static_cast<unsigned>(gemm_.height)) &
           (static_cast<unsigned>(left_[i] + here.right) < static_cast<unsigned>(gemm_.width));
  }

  // A copy that is not valid gets an address that is.
  __device__ __forceinline__ void copy_chunks(unsigned char* to) {
    const Here at = here();
#pragma unroll
    for (int i = 0; i < TILE::COPIES_M; ++i) {
      const bool valid = has_pixel(at, i);
      copy_async<16, true>(
          to + i * TILE::THREAD_ROWS * TILE::ROW_BYTES, image_ + (valid ? pixel_[i] + at.pixel : 0), valid);
    }
#pragma unroll
    for (int i = 0; i < TILE::COPIES_N; ++i) {
      copy_async<16>(to + (TILE::M + i * TILE::THREAD_ROWS) * TILE::ROW_BYTES,
          gemm_.weight + (at.exists ? weight_[i] + at.weight : 0), at.exists);
    }
  }

  // Elements of a chunk may belong to different places of the window: each is read by itself.
  __device__ __forceinline__ void copy_elements(unsigned char* to) {
    Vector<T, WIDTH<T>> pixels[TILE::COPIES_M], weights[TILE::COPIES_N];
#pragma unroll
    for (int element = 0; element < WIDTH<T>; ++element) {
      const Here at = here();
#pragma unroll
      for (int i = 0; i < TILE::COPIES_M; ++i) {
        pixels[i].at[element] = has_pixel(at, i) ? image_[pixel_[i] + at.pixel] : static_cast<T>(0.0f);
      }
#pragma unroll
      for (int i = 0; i < TILE::COPIES_N; ++i) {
        weights[i].at[element] = at.exists ? gemm_.weight[weight_[i] + at.weight] : static_cast<T>(0.0f);
      }
      walk_.advance(gemm_, 1);
    }
#pragma unroll
    for (int i = 0; i < TILE::COPIES_M; ++i) {
      *reinterpret_cast<Vector<T, WIDTH<T>>*>(to + i * TILE::THREAD_ROWS * TILE::ROW_BYTES) = pixels[i];
    }
#pragma unroll
    for (int i = 0; i < TILE::COPIES_N; ++i) {
      *reinterpret_cast<Vector<T, WIDTH<T>>*>(to + (TILE::M + i * TILE::THREAD_ROWS) * TILE::ROW_BYTES) = weights[i];
    }
    walk_.advance(gemm_, (TILE::ROW_CHUNKS - 1) * WIDTH<T>);
  }

  static constexpr int NOWHERE = -(1 << 30);  // above every image, whatever the window adds

  const Gemm<T>& gemm_;
  KWalk walk_;
  int target_;
  const T* image_;                                                          // the group's channels in the first image
  int top_[TILE::COPIES_M], left_[TILE::COPIES_M], pixel_[TILE::COPIES_M];  // the last: offset of (top, left)
  int weight_[TILE::COPIES_N];
};

// A warp's part of the product. values[i][j] is the m16n8 tile i, j as the matrix instruction lays it out: lane l has
// rows l / 4 and l / 4 + 8, columns l % 4 * 2 and the next.
template <class T, class TILE>
class Accumulators {
 public:
  static constexpr int TILES_M = TILE::WARP_M / 16, TILES_N = TILE::WARP_N / 8;
  float values[TILES_M][TILES_N][4] = {};

  __device__ __forceinline__ Accumulators() {
    const int warp = static_cast<int>(threadIdx.x) / WARP, lane = static_cast<int>(threadIdx.x) % WARP;
    row_ = warp / TILE::WARPS_N * TILE::WARP_M;
    column_ = warp % TILE::WARPS_N * TILE::WARP_N;
    // ldmatrix: the lane's row among its operand's 16, and its half of the 32 bytes that one step multiplies
    pixels_ = chunk_at(row_ + lane % 16, lane / 16);
    weights_ = TILE::M * TILE::ROW_BYTES + chunk_at(column_ + lane / 16 * 8 + lane % 8, lane / 8 % 2);
  }

  // Add the product of a stage's operands.
  __device__ __forceinline__ void add(const unsigned char* stage) {
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      uint32_t a[TILES_M][4], b[TILES_N / 2][4];
#pragma unroll
      for (int i = 0; i < TILES_M; ++i) {
        read(a[i], stage + (pixels_ ^ step * 32) + i * 16 * TILE::ROW_BYTES);
      }
#pragma unroll
      for (int j = 0; j < TILES_N / 2; ++j) {
        read(b[j], stage + (weights_ ^ step * 32) + j * 16 * TILE::ROW_BYTES);
      }
#pragma unroll
      for (int i = 0; i < TILES_M; ++i) {
#pragma unroll
        for (int j = 0; j < TILES_N; ++j) {
          const uint32_t pair[2] = {b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]};
          mma<T>(values[i][j], a[i], pair);
        }
      }
    }
  }

  // Where the warp's part is in the block's.
  __device__ __forceinline__ int row() const { return row_; }
  __device__ __forceinline__ int column() const { return column_; }

 private:
  __device__ __forceinline__ void read(uint32_t (&values)[4], const unsigned char* from) const {
    load_matrices(values, from);
    if constexpr (std::is_same_v<T, float>) {
#pragma unroll
      for (uint32_t& value : values) {
        value = to_tf32(std::bit_cast<float>(value));
      }
    }
  }

  int row_, column_, pixels_, weights_;
};

}  // namespace fastcnn::cuda
