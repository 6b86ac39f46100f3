// LRN + max-pool. Forward: a block normalizes the pixels under its tile of windows into shared memory, rounded as a
// normalized tensor would be, and pools from there. Backward: LRN's, from the pooled gradient and the codes.

#include "lrn_pool.h"

#include <algorithm>

#include "../ops.h"
#include "lrn_backward.h"
#include "pool_scan.h"

namespace fastcnn::cuda {
namespace {

constexpr int POOL_THREADS = 256;
constexpr int64_t TILE_BYTES = 40 * 1024;  // of shared memory: several blocks to a multiprocessor

// A block's share of the output, and how many blocks lie along each axis.
struct Tiles {
  int32_t rows, columns, channels;
  int32_t down, across, deep;
  SmallDivisor by_columns, by_windows, by_groups;  // by_groups: of a pooling thread's channels

  Tiles() = default;
  Tiles(int64_t rows, int64_t columns, int64_t channels, int64_t width, const Plane& plane, int64_t all_channels)
      : rows(narrow(rows)),
        columns(narrow(columns)),
        channels(narrow(channels)),
        down(narrow(ceil_div(plane.out_height, rows))),
        across(narrow(ceil_div(plane.out_width, columns))),
        deep(narrow(ceil_div(all_channels, channels))),
        by_columns(columns),
        by_windows(rows * columns),
        by_groups(channels / width) {}
};

// `count` neighbours from `begin`.
struct Range {
  int32_t begin;
  int32_t count;
};

// The last tile ends with the axis: where tiles do not divide it, it repeats some of the tile before.
__device__ __forceinline__ Range tile_range(uint32_t tile, int32_t count, int32_t length) {
  const int32_t begin = static_cast<int32_t>(tile) * count, last = length - count;
  return {begin < last ? begin : last, count};
}

// The pixels of the image that windows cover.
__device__ __forceinline__ Range covered(const AxisOf<int32_t>& axis, int32_t length, const Range& windows) {
  const int32_t start = first_pixel(axis, windows.begin);
  const int32_t stop = first_pixel(axis, windows.begin + windows.count - 1) + span(axis);
  const int32_t begin = start > 0 ? start : 0, end = stop < length ? stop : length;
  return {begin, end > begin ? end - begin : 0};
}

// What a block works on: windows, the pixels under them, channels. In shared memory channels are the fastest axis of a
// channels_last tile, pixels that of another.
struct Tile {
  int64_t image;
  Range down, across, channels;
  Range rows, columns;
  bool channels_last;

  __device__ __forceinline__ int32_t pixels() const { return rows.count * columns.count; }
  __device__ __forceinline__ int32_t pixel_step() const { return channels_last ? channels.count : 1; }
  __device__ __forceinline__ int32_t channel_step() const { return channels_last ? 1 : pixels(); }
};

template <Path PATH>
__device__ __forceinline__ Tile tile_at(
    uint32_t block, const Tiles& tiles, const Window32& window, const Plane32& plane, const Layout& layout) {
  const auto deep = static_cast<uint32_t>(tiles.deep), across = static_cast<uint32_t>(tiles.across);
  const auto down = static_cast<uint32_t>(tiles.down);
  const uint32_t column = block / deep, row = column / across, image = row / down;
  Tile tile;
  tile.image = image;
  tile.channels = tile_range(block - column * deep, tiles.channels, static_cast<int32_t>(layout.channels));
  tile.across = tile_range(column - row * across, tiles.columns, plane.out_width);
  tile.down = tile_range(row - image * down, tiles.rows, plane.out_height);
  tile.rows = covered(window.rows, plane.height, tile.down);
  tile.columns = covered(window.columns, plane.width, tile.across);
  tile.channels_last = PATH == Path::VECTORS || (PATH == Path::ELEMENTS && layout.channels_last);
  return tile;
}

// The i-th pair of a column and a row of `columns` columns.
struct Place {
  int32_t column;
  int32_t row;
};

__device__ __forceinline__ Place place_of(int32_t i, int32_t columns) {
  const auto row = static_cast<int32_t>(static_cast<uint32_t>(i) / static_cast<uint32_t>(columns));
  return {i - row * columns, row};
}

// The i-th of count x groups things to do in a tile; neighbouring threads have neighbours of the fastest axis.
struct Task {
  int32_t place;
  int32_t group;  // of channels
};

__device__ __forceinline__ Task task_of(int32_t i, const Tile& tile, int32_t places, int32_t groups) {
  const Place found = place_of(i, tile.channels_last ? groups : places);
  return tile.channels_last ? Task{found.row, found.column} : Task{found.column, found.row};
}

template <class T, Path PATH>
__device__ __forceinline__ void normalize_tile(
    const T* x, T* shared, const Tile& tile, const Plane32& plane, const Layout& layout, const LRN& norm) {
  constexpr int32_t LENGTH = PATH == Path::ELEMENTS ? 1 : RUN<T>;
  const int32_t pixels = tile.pixels(), groups = (tile.channels.count + LENGTH - 1) / LENGTH;
  const auto channels = static_cast<int32_t>(layout.channels);
  for (auto i = static_cast<int32_t>(threadIdx.x); i < pixels * groups; i += POOL_THREADS) {
    const Task task = task_of(i, tile, pixels, groups);
    const Place place = place_of(task.place, tile.columns.count);
    const int64_t pixel =
        static_cast<int64_t>(tile.rows.begin + place.row) * plane.width + tile.columns.begin + place.column;
    const Range group = tile_range(static_cast<uint32_t>(task.group), LENGTH, tile.channels.count);
    const int32_t channel = tile.channels.begin + group.begin;
    Run to{task.place * tile.pixel_step(), tile.channel_step(), 0, 0, group.begin, 0};
    Run from{tile.image * channels * layout.pixels + pixel * (tile.channels_last ? channels : 1),
        tile.channels_last ? 1 : layout.pixels, 0, 0, channel, channels};
    if constexpr (PATH == Path::ELEMENTS) {
      const T* value = x + from.begin + channel * from.step;
      const float factor = factors_at(value, channel, channels, from.step, norm).factor;
      shared[to.begin + group.begin * to.step] = static_cast<T>(static_cast<float>(*value) * factor);
    } else {
      store_run<PATH>(shared, to, normalize_run<PATH>(x, from, norm));
    }
  }
}

// Loads normalized values from a block's tile.
template <class T, int N>
struct TileLoad {
  const T* shared;  // of the thread's first channel
  const Tile& tile;

  __device__ __forceinline__ int line(int row) const {
    return (row - tile.rows.begin) * tile.columns.count - tile.columns.begin;
  }
  __device__ __forceinline__ Vector<T, N> at(int line, int column) const {
    return load_packed<N>(shared + (line + column) * tile.pixel_step());
  }
  __device__ __forceinline__ Vector<T, N> prepared(const Vector<T, N>& loaded) const { return loaded; }
};

template <int SIDE, int N, class T>
__device__ __forceinline__ void pool_tile(const T* shared, T* y, uint8_t* codes, const Tile& tile, const Tiles& tiles,
    const Window32& window, const Plane32& plane, int64_t channels) {
  const int32_t windows = tile.down.count * tile.across.count, groups = tile.channels.count / N;
  const int64_t of_image = static_cast<int64_t>(plane.out_height) * plane.out_width;
  for (auto i = static_cast<int32_t>(threadIdx.x); i < windows * groups; i += POOL_THREADS) {
    const SmallDivisor& by_inner = tile.channels_last ? tiles.by_groups : tiles.by_windows;
    const int32_t inner = tile.channels_last ? groups : windows;
    const int32_t outer_index = by_inner.quotient(i), inner_index = i - outer_index * inner;
    const int32_t window_index = tile.channels_last ? outer_index : inner_index;
    const int32_t group = tile.channels_last ? inner_index : outer_index;
    const int32_t row = tiles.by_columns.quotient(window_index), column = window_index - row * tile.across.count;
    const int32_t down = tile.down.begin + row, across = tile.across.begin + column;
    const TileLoad<T, N> load{shared + group * N * tile.channel_step(), tile};
    const Best<T, N> best = scan<SIDE, T, N>(window, plane, down, across, codes != nullptr, load);
    const int64_t out = static_cast<int64_t>(down) * plane.out_width + across;
    const int64_t channel = tile.channels.begin + group * N;
    const int64_t at =
        tile.image * channels * of_image + (tile.channels_last ? out * channels + channel : channel * of_image + out);
    best.store(y + at);
    if (codes != nullptr) {
      best.store_codes(codes + at);
    }
  }
}

template <class T, Path PATH, int SIDE>
__global__ void __launch_bounds__(POOL_THREADS) lrn_pool_kernel(const T* __restrict__ x, T* __restrict__ y,
    uint8_t* __restrict__ codes, Layout layout, LRN norm, Window32 window, Plane32 plane, Tiles tiles) {
  T* shared = reinterpret_cast<T*>(shared_memory());
  const Tile tile = tile_at<PATH>(blockIdx.x, tiles, window, plane, layout);
  normalize_tile<T, PATH>(x, shared, tile, plane, layout, norm);
  __syncthreads();
  pool_tile<SIDE, PATH == Path::VECTORS ? WIDTH<T> : 1>(shared, y, codes, tile, tiles, window, plane, layout.channels);
}

// The least size of tiles that cover a length in as few as `most` would.
int64_t balanced(int64_t length, int64_t most) { return ceil_div(length, ceil_div(length, most)); }

int64_t covered_by(const Axis& axis, int64_t length, int64_t windows) {
  return std::min((windows - 1) * axis.stride + span(axis), length);
}

struct Plan {
  Tiles tiles;
  int64_t shared_bytes;
};

// Tiles of channels worth a line of memory and enough windows that those at the border, which other blocks normalize
// again, are few; smaller where windows are large.
template <class T>
Plan make_plan(Path path, const Window& window, const Plane& plane, const Layout& layout) {
  const bool channels_last = layout.channels_last;
  const int64_t least = path == Path::ELEMENTS ? 1 : RUN<T>, unit = path == Path::VECTORS ? WIDTH<T> : 1;
  int64_t channels = round_up(balanced(layout.channels, RUN<T> * (channels_last ? 4 : 2)), unit);
  int64_t rows = balanced(plane.out_height, channels_last ? 8 : 4);
  int64_t columns = balanced(plane.out_width, channels_last ? 8 : 32);
  const auto bytes = [&] {
    return covered_by(window.rows, plane.height, rows) * covered_by(window.columns, plane.width, columns) * channels *
           static_cast<int64_t>(sizeof(T));
  };
  while (bytes() > TILE_BYTES && rows * columns > 1) {
    int64_t& longer = rows < columns ? columns : rows;
    longer = ceil_div(longer, 2);
  }
  while (bytes() > TILE_BYTES && channels > least) {
    channels = std::max(least, round_up(channels / 2, unit));
  }
  return {Tiles(rows, columns, channels, unit, plane, layout.channels), bytes()};
}

template <class T>
auto kernel_for(Path path, bool three) {
  switch (path) {
    case Path::VECTORS:
      return three ? lrn_pool_kernel<T, Path::VECTORS, 3> : lrn_pool_kernel<T, Path::VECTORS, 0>;
    case Path::PLANES:
      return three ? lrn_pool_kernel<T, Path::PLANES, 3> : lrn_pool_kernel<T, Path::PLANES, 0>;
    default:
      return lrn_pool_kernel<T, Path::ELEMENTS, 0>;
  }
}

// Fill y, and codes if they have elements; false if no tile fits in shared memory.
template <class T>
bool lrn_pool_into(const Device& device, Path path, const Tensor& x, Tensor& y, Tensor& codes, const Layout& layout,
    const LRN& norm, const Window& window, const Plane& plane) {
  const Plan plan = make_plan<T>(path, window, plane, layout);
  if (plan.shared_bytes > MOST_SHARED_BYTES) {
    return false;
  }
  const Tiles& tiles = plan.tiles;
  const int64_t blocks = layout.images * tiles.down * tiles.across * tiles.deep;
  uint8_t* places = codes.numel() == 0 ? nullptr : mutable_data<uint8_t>(codes);
  device.launch(kernel_for<T>(path, is_square(window, 3)), blocks, POOL_THREADS, plan.shared_bytes, data<T>(x),
      mutable_data<T>(y), places, layout, norm, narrow(window), narrow(plane), tiles);
  return true;
}

std::tuple<Tensor, Tensor> forward(
    const Tensor& input, int64_t size, double alpha, double beta, double k, const Window& window, bool with_codes) {
  STD_TORCH_CHECK(input.dim() == 4, "lrn_pool: expected (N, C, H, W), got ", input.dim(), " axes");
  STD_TORCH_CHECK(size > 0, "lrn_pool: expected a positive size, got ", size);
  const bool channels_last = is_channels_last(input);
  const Device device(input);
  const Tensor x = dense(input, channels_last);
  const Plane plane = make_plane(window, x.size(2), x.size(3));
  const std::vector<int64_t> shape{x.size(0), x.size(1), plane.out_height, plane.out_width}, none{0, 1, 1, 1};
  Tensor y = new_tensor(x, shape, x.scalar_type(), channels_last);
  Tensor codes = new_tensor(x, with_codes ? shape : none, torch::headeronly::ScalarType::Byte, channels_last);
  if (y.numel() == 0) {
    return {y, codes};
  }
  const Layout sizes = layout(x, channels_last);
  bool fits = false;
  with_type("lrn_pool", x, [&](auto type) {
    using T = decltype(type);
    const Path path = path_of<T>(sizes, size, beta, k, x, y);
    fits = lrn_pool_into<T>(
        device, path, x, y, codes, sizes, make_norm(size, alpha, beta, k, input.size(1)), window, plane);
  });
  if (!fits) {
    return pool(lrn(x, size, alpha, beta, k), std::nullopt, window, false, with_codes);
  }
  return {y, codes};
}

}  // namespace

Tensor lrn_pool(const Tensor& input, int64_t size, double alpha, double beta, double k, const Window& window) {
  return std::get<0>(forward(input, size, alpha, beta, k, window, false));
}

std::tuple<Tensor, Tensor> lrn_pool_codes(
    const Tensor& input, int64_t size, double alpha, double beta, double k, const Window& window) {
  return forward(input, size, alpha, beta, k, window, true);
}

Tensor lrn_pool_backward(const Tensor& grad, const Tensor& codes, const Tensor& input, int64_t size, double alpha,
    double beta, double k, const Window& window) {
  STD_TORCH_CHECK(input.dim() == 4, "lrn_pool_backward: expected (N, C, H, W), got ", input.dim(), " axes");
  STD_TORCH_CHECK(grad.scalar_type() == input.scalar_type(), "lrn_pool_backward: gradient and input differ in dtype");
  STD_TORCH_CHECK(codes.scalar_type() == torch::headeronly::ScalarType::Byte, "lrn_pool_backward: codes are uint8");
  STD_TORCH_CHECK(size > 0, "lrn_pool_backward: expected a positive size, got ", size);
  const Plane plane = make_plane(window, input.size(2), input.size(3));
  const int64_t pooled = input.size(0) * input.size(1) * plane.out_height * plane.out_width;
  STD_TORCH_CHECK(grad.dim() == 4 && codes.dim() == 4 && grad.numel() == pooled && codes.numel() == pooled,
      "lrn_pool_backward: expected a gradient and codes of the pooled shape");
  const bool channels_last = is_channels_last(input);
  const Device device(input);
  const Tensor x = dense(input, channels_last), from = dense(grad, channels_last), places = dense(codes, channels_last);
  Tensor dx = new_tensor(x, x.sizes(), x.scalar_type(), channels_last);
  if (dx.numel() == 0) {
    return dx;
  }
  const Layout sizes = layout(x, channels_last);
  with_type("lrn_pool_backward", x, [&](auto type) {
    using T = decltype(type);
    const Path path = path_of<T>(sizes, size, beta, k, x, from, places, dx);
    const PooledGradient<T> source{data<T>(from), data<uint8_t>(places), narrow(window), narrow(plane)};
    lrn_backward_into<T>(device, path, x, source, dx, sizes, make_norm(size, alpha, beta, k, input.size(1)));
  });
  return dx;
}

}  // namespace fastcnn::cuda
