// LRN + max-pool: a block normalizes the pixels under its tile of windows into shared memory, rounded as a normalized
// tensor would be, and pools from there; lrn_pool_backward.cu goes back.

#include <algorithm>

#include "../ops.h"
#include "launch.h"
#include "lrn.h"
#include "max_pool.h"
#include "pool_scan.h"
#include "pool_strips.h"

namespace fastcnn::cuda {
namespace {

constexpr int POOL_THREADS = 256;
constexpr int64_t TILE_BYTES = 48 * 1024;  // of shared memory: several blocks to a multiprocessor

// A block's share of the output, and how many blocks lie along each axis. height and width: the rows and columns of
// pixels that a tile has room for in shared memory.
struct Tiles {
  int32_t rows, columns, channels;
  int32_t height, width;
  int32_t strip;  // rows of windows of a thread
  int32_t down, across, deep;
  SmallDivisor by_columns, by_windows, by_groups;  // by_groups: of a pooling thread's channels
  SmallDivisor by_width, by_pixels, by_runs, by_pairs;
  SmallDivisor by_deep, by_across, by_down;
};

// `count` neighbours from `begin`.
struct Range {
  int32_t begin;
  int32_t count;
};

// The last tile ends with the axis: where tiles do not divide it, it repeats some of the tile before.
__device__ __forceinline__ Range tile_range(int32_t tile, int32_t count, int32_t length) {
  const int32_t begin = tile * count, last = length - count;
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

  int32_t width, pixels;  // of shared memory

  __device__ __forceinline__ int32_t pixel_step() const { return channels_last ? channels.count : 1; }
  __device__ __forceinline__ int32_t channel_step() const { return channels_last ? 1 : pixels; }
};

template <Path PATH>
__device__ __forceinline__ Tile tile_at(
    int32_t block, const Tiles& tiles, const Window32& window, const Plane32& plane, const Layout& layout) {
  const int32_t column = tiles.by_deep.quotient(block), row = tiles.by_across.quotient(column);
  const int32_t image = tiles.by_down.quotient(row);
  Tile tile;
  tile.image = image;
  tile.channels = tile_range(block - column * tiles.deep, tiles.channels, static_cast<int32_t>(layout.channels));
  tile.across = tile_range(column - row * tiles.across, tiles.columns, plane.out_width);
  tile.down = tile_range(row - image * tiles.down, tiles.rows, plane.out_height);
  tile.rows = covered(window.rows, plane.height, tile.down);
  tile.columns = covered(window.columns, plane.width, tile.across);
  tile.channels_last = PATH == Path::VECTORS || (PATH == Path::ELEMENTS && layout.channels_last);
  tile.width = tiles.width;
  tile.pixels = tiles.height * tiles.width;
  return tile;
}

template <class T, Path PATH>
__device__ __forceinline__ void normalize_tile(const T* x, T* shared, const Tile& tile, const Tiles& tiles,
    const Plane32& plane, const Layout& layout, const LRN& norm) {
  constexpr int32_t LENGTH = PATH == Path::ELEMENTS ? 1 : RUN<T>;
  const int32_t runs = (tile.channels.count + LENGTH - 1) / LENGTH;
  const auto channels = static_cast<int32_t>(layout.channels);
  const T* corner = x + (tile.image * channels * layout.pixels +
                            (static_cast<int64_t>(tile.rows.begin) * plane.width + tile.columns.begin) *
                                (tile.channels_last ? channels : 1));
  for (auto i = static_cast<int32_t>(threadIdx.x); i < tile.pixels * runs; i += POOL_THREADS) {
    // Neighbouring threads have neighbours of the fastest axis.
    const int32_t outer = (tile.channels_last ? tiles.by_runs : tiles.by_pixels).quotient(i);
    const int32_t inner = i - outer * (tile.channels_last ? runs : tile.pixels);
    const int32_t place = tile.channels_last ? outer : inner, number = tile.channels_last ? inner : outer;
    const int32_t row = tiles.by_width.quotient(place), column = place - row * tile.width;
    if (row >= tile.rows.count || column >= tile.columns.count) {
      continue;
    }
    const Range group = tile_range(number, LENGTH, tile.channels.count);
    const int32_t channel = tile.channels.begin + group.begin;
    const int64_t pixel = static_cast<int64_t>(row) * plane.width + column;
    const Run to{place * tile.pixel_step(), tile.channel_step(), 0, 0, group.begin, 0};
    Run from{
        pixel * (tile.channels_last ? channels : 1), tile.channels_last ? 1 : layout.pixels, 0, 0, channel, channels};
    if constexpr (PATH == Path::ELEMENTS) {
      const T* value = corner + (from.begin + channel * from.step);
      const float factor = factors_at(value, channel, channels, from.step, norm).factor;
      shared[to.begin + group.begin * to.step] = static_cast<T>(static_cast<float>(*value) * factor);
    } else {
      store_run<PATH, true>(shared, to, normalize_run<PATH>(corner, from, norm));
    }
  }
}

// Loads normalized values from a block's tile.
template <class T, int N>
struct TileLoad {
  const T* shared;  // of the thread's first channel
  const Tile& tile;

  __device__ __forceinline__ int line(int row) const {
    return (row - tile.rows.begin) * tile.width - tile.columns.begin;
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
    store_packed(y + at, best.values());
    if (codes != nullptr) {
      store_packed(codes + at, best.codes());
    }
  }
}

// The same in NCHW, windows that lie two pixels apart: a thread goes down the tile with two columns of them.
template <int SIDE, bool CODES, class T>
__device__ __forceinline__ void pool_tile_by_strips(const T* shared, T* y, uint8_t* codes, const Tile& tile,
    const Tiles& tiles, const Window32& window, const Plane32& plane, int64_t channels) {
  const int32_t pairs = (tile.across.count + PAIR - 1) / PAIR;
  const int64_t of_image = static_cast<int64_t>(plane.out_height) * plane.out_width;
  const int64_t first = (tile.image * channels + tile.channels.begin) * of_image;
  const auto prepare = [](const Vector<T, PAIR>& values) { return values; };
  for (auto i = static_cast<int32_t>(threadIdx.x); i < pairs * tile.channels.count; i += POOL_THREADS) {
    const int32_t channel = tiles.by_pairs.quotient(i);
    const int32_t column = tile.across.begin + first_of_pair(i - channel * pairs, tile.across.count);
    const T* image = shared + (channel * tile.pixels - (tile.rows.begin * tile.width + tile.columns.begin));
    T* to = y + (first + channel * of_image);
    pool_strip<SIDE, CODES>(image, tile.width, to, codes + (CODES ? first + channel * of_image : 0), prepare, false,
        window, plane, tile.down.begin, tile.down.count, column);
  }
}

// A column of windows of SIDE x SIDE neighbours in a channels_last tile, N channels of it.
template <int SIDE, int N, bool CODES, class T>
struct WindowColumn {
  static constexpr int COUNT = N;
  int offsets[SIDE];  // of the columns; one outside stands for its neighbour
  bool begins;

  __device__ __forceinline__ Best<T, N> row(const T* line) const {
    Vector<T, N> places[SIDE];
#pragma unroll
    for (int s = 0; s < SIDE; ++s) {
      places[s] = load_packed<N>(line + offsets[s]);
    }
    return Best<T, N>(places, CODES, begins ? 0xffffffffu : 0u);
  }

  __device__ __forceinline__ bool value(const T* line, int i, int s, float& value) const {
    value = static_cast<float>(line[(s == 0 ? offsets[0] : s == 1 ? offsets[1] : offsets[SIDE - 1]) + i]);
    return s > 0 || begins;
  }

  template <class Element>
  __device__ __forceinline__ static void store(Element* to, const Vector<Element, N>& elements) {
    store_packed(to, elements);
  }
};

// The same in channels_last: a thread goes down a strip of the tile with a column of windows, N channels of it.
template <int SIDE, int N, bool CODES, class T>
__device__ __forceinline__ void pool_tile_by_columns(const T* shared, T* y, uint8_t* codes, const Tile& tile,
    const Tiles& tiles, const Window32& window, const Plane32& plane, int64_t channels) {
  const int32_t groups = tile.channels.count / N, columns = tile.across.count;
  const int32_t strips = (tile.down.count + tiles.strip - 1) / tiles.strip;
  const int64_t first = tile.image * (plane.out_height * plane.out_width);
  for (auto i = static_cast<int32_t>(threadIdx.x); i < strips * columns * groups; i += POOL_THREADS) {
    const int32_t place = tiles.by_groups.quotient(i), strip = tiles.by_columns.quotient(place);
    const int32_t channel = (i - place * groups) * N, across = tile.across.begin + place - strip * columns;
    const int32_t down = tile.down.begin + strip * tiles.strip, rest = tile.down.count - strip * tiles.strip;
    const int32_t top = first_pixel(window.rows, down), left = first_pixel(window.columns, across);
    WindowColumn<SIDE, N, CODES, T> column;
#pragma unroll
    for (int s = 0; s < SIDE; ++s) {
      column.offsets[s] = (into(left + s, plane.width) - tile.columns.begin) * tile.channels.count + channel;
    }
    column.begins = left >= 0;
    const int32_t pitch = tile.width * tile.channels.count, step = plane.out_width * static_cast<int32_t>(channels);
    const int64_t to = (first + down * plane.out_width + across) * channels + (tile.channels.begin + channel);
    pool_rows<SIDE, CODES>(column, shared + (top - tile.rows.begin) * pitch, pitch, top, plane.height, y + to,
        codes + (CODES ? to : 0), step, rest < tiles.strip ? rest : tiles.strip, false);
  }
}

// STRIPS: windows of SIDE x SIDE neighbours that lie two pixels apart. CODES: whether codes are asked for; others look.
template <class T, Path PATH, int SIDE, bool STRIPS, bool CODES>
__global__ void __launch_bounds__(POOL_THREADS) lrn_pool_kernel(const T* __restrict__ x, T* __restrict__ y,
    uint8_t* __restrict__ codes, Layout layout, LRN norm, Window32 window, Plane32 plane, Tiles tiles) {
  T* shared = reinterpret_cast<T*>(shared_memory());
  const Tile tile = tile_at<PATH>(static_cast<int32_t>(blockIdx.x), tiles, window, plane, layout);
  normalize_tile<T, PATH>(x, shared, tile, tiles, plane, layout, norm);
  __syncthreads();
  constexpr int N = PATH == Path::VECTORS ? WIDTH<T> : 1;
  if constexpr (STRIPS && PATH == Path::PLANES) {
    pool_tile_by_strips<SIDE, CODES>(shared, y, codes, tile, tiles, window, plane, layout.channels);
  } else if constexpr (STRIPS) {
    pool_tile_by_columns<SIDE, N, CODES>(shared, y, codes, tile, tiles, window, plane, layout.channels);
  } else {
    pool_tile<SIDE, N>(shared, y, codes, tile, tiles, window, plane, layout.channels);
  }
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
  const int64_t run = path == Path::ELEMENTS ? 1 : RUN<T>;
  const int64_t width = path == Path::VECTORS ? WIDTH<T> : 1;  // channels of a thread that pools
  const int64_t unit = path == Path::PLANES ? 2 : width;       // runs begin with an even channel
  int64_t channels = round_up(balanced(layout.channels, RUN<T> * (channels_last ? 4 : 2)), unit);
  int64_t rows = balanced(plane.out_height, channels_last ? 13 : 4);
  int64_t columns = balanced(plane.out_width, channels_last ? 13 : 32);
  const auto pixels = [&] {
    return std::pair(covered_by(window.rows, plane.height, rows), covered_by(window.columns, plane.width, columns));
  };
  const auto bytes = [&] { return pixels().first * pixels().second * channels * static_cast<int64_t>(sizeof(T)); };
  const auto halve_channels = [&](int64_t least) {
    while (bytes() > TILE_BYTES && channels > least) {
      channels = std::max(least, round_up(channels / 2, unit));
    }
  };
  halve_channels(2 * run);
  while (bytes() > TILE_BYTES && rows * columns > 1) {
    int64_t& longer = rows < columns ? columns : rows;
    longer = ceil_div(longer, 2);
  }
  halve_channels(run);
  const auto [height, across] = pixels();
  Tiles tiles{};
  tiles.rows = narrow(rows);
  tiles.columns = narrow(columns);
  tiles.channels = narrow(channels);
  tiles.height = narrow(height);
  tiles.width = narrow(across);
  tiles.down = narrow(ceil_div(plane.out_height, rows));
  tiles.across = narrow(ceil_div(plane.out_width, columns));
  tiles.deep = narrow(ceil_div(layout.channels, channels));
  // strips of three rows at least, where one row of pixels in three or more is judged twice
  tiles.strip =
      narrow(std::max<int64_t>(ceil_div(rows, std::max<int64_t>(POOL_THREADS / (columns * (channels / width)), 1)), 3));
  tiles.by_columns = columns;
  tiles.by_windows = rows * columns;
  tiles.by_groups = channels / width;
  tiles.by_width = across;
  tiles.by_pixels = height * across;
  tiles.by_runs = ceil_div(channels, run);
  tiles.by_pairs = ceil_div(columns, PAIR);
  tiles.by_deep = tiles.deep;
  tiles.by_across = tiles.across;
  tiles.by_down = tiles.down;
  return {tiles, bytes()};
}

template <class T, Path PATH>
auto kernel_by_strips(bool codes) {
  return codes ? lrn_pool_kernel<T, PATH, 3, true, true> : lrn_pool_kernel<T, PATH, 3, true, false>;
}

template <class T>
auto kernel_for(Path path, bool strips, bool three, bool codes) {
  switch (path) {
    case Path::VECTORS:
      return strips  ? kernel_by_strips<T, Path::VECTORS>(codes)
             : three ? lrn_pool_kernel<T, Path::VECTORS, 3, false, false>
                     : lrn_pool_kernel<T, Path::VECTORS, 0, false, false>;
    case Path::PLANES:
      return strips ? kernel_by_strips<T, Path::PLANES>(codes) : lrn_pool_kernel<T, Path::PLANES, 0, false, false>;
    default:
      return lrn_pool_kernel<T, Path::ELEMENTS, 0, false, false>;
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
  const bool strips = tiles.columns >= PAIR && side_of_strips(window, plane) == 3;
  uint8_t* places = codes.numel() == 0 ? nullptr : mutable_data<uint8_t>(codes);
  device.launch(kernel_for<T>(path, strips, is_square(window, 3), places != nullptr), blocks, POOL_THREADS,
      plan.shared_bytes, data<T>(x), mutable_data<T>(y), places, layout, norm, narrow(window), narrow(plane), tiles);
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

}  // namespace fastcnn::cuda
