// LRN + max-pool, backward: LRN's, from the pooled gradient and the codes.
//
// In channels_last a block first gathers the gradients of a row of patches into shared memory, rounded as an unpooled
// tensor would be. Otherwise each thread gathers those of its run, or of its element.

#include <algorithm>

#include "../ops.h"
#include "lrn_backward.h"
#include "max_pool.h"
#include "pooled.h"

namespace fastcnn::cuda {
namespace {

// The windows of an axis, divided by which before a kernel starts.
struct WindowAxis {
  AxisOf<int32_t> axis;
  int32_t windows;
  SmallDivisor by_stride, by_dilation;

  WindowAxis() = default;
  WindowAxis(const Axis& axis, int64_t windows)
      : axis(narrow(axis)), windows(narrow(windows)), by_stride(axis.stride), by_dilation(axis.dilation) {}

  // Call visit(window, place) for the windows that cover a pixel.
  template <class Visit>
  __device__ __forceinline__ void visit_windows(int32_t pixel, const Visit& visit) const {
    const int32_t last = by_stride.quotient(pixel + axis.padding);
    int32_t window = last < windows ? last : windows - 1;
    int32_t distance = pixel - first_pixel(axis, window);
#pragma unroll 1
    for (; window >= 0 && distance < span(axis); --window, distance += axis.stride) {
      const int32_t place = by_dilation.quotient(distance);
      if (place * axis.dilation == distance) {
        visit(window, place);
      }
    }
  }
};

// The gradient of an LRN's output: what the windows that chose it got.
template <class T>
struct PooledGradient {
  const T* grad;         // (N, C, OH, OW) in x's layout
  const uint8_t* codes;  // the same
  WindowAxis rows, columns;
  SmallDivisor by_width;  // of x

  PooledGradient(const T* grad, const uint8_t* codes, const Window& window, const Plane& plane)
      : grad(grad),
        codes(codes),
        rows(window.rows, plane.out_height),
        columns(window.columns, plane.out_width),
        by_width(plane.width),
        width_(narrow(plane.width)) {}

  __device__ __forceinline__ int64_t windows() const { return static_cast<int64_t>(rows.windows) * columns.windows; }

  // Call visit(window, code) for the windows of an image that cover its pixel, with the code that chooses it.
  template <class Visit>
  __device__ __forceinline__ void visit_all(uint32_t pixel, const Visit& visit) const {
    const int32_t row = by_width.quotient(static_cast<int32_t>(pixel));
    const int32_t column = static_cast<int32_t>(pixel) - row * width_;
    rows.visit_windows(row, [&](int32_t down, int32_t r) {
      columns.visit_windows(column,
          [&](int32_t right, int32_t s) { visit(down * columns.windows + right, code_of(r, s, columns.axis)); });
    });
  }

  template <Path PATH>
  __device__ __forceinline__ Values<float, RUN<T> + 2 * REACH> of_run(const Run& run) const {
    return of_run(run, std::integral_constant<Path, PATH>());
  }

  // Vectors of channels, and the halo's two on either side.
  __device__ __forceinline__ Values<float, RUN<T> + 2 * REACH> of_run(
      const Run& run, std::integral_constant<Path, Path::VECTORS>) const {
    constexpr int PARTS = RUN<T> / WIDTH<T>;
    const bool before = exists<T, REACH>(run, 0), after = exists<T, REACH>(run, RUN<T> + 2 * REACH - 1);
    Floats<WIDTH<T>> parts[PARTS] = {};
    Floats<REACH> head{}, tail{};
    const int64_t first = run.image * windows() * run.channels + run.channel;
    visit_all(run.pixel, [&](int32_t covering, int32_t chosen) {
      const int64_t at = first + static_cast<int64_t>(covering) * run.channels;
#pragma unroll
      for (int part = 0; part < PARTS; ++part) {
        add(at + part * WIDTH<T>, true, chosen, parts[part]);
      }
      add(before ? at - REACH : at, before, chosen, head);
      add(after ? at + RUN<T> : at, after, chosen, tail);
    });
    Values<float, RUN<T> + 2 * REACH> total;
#pragma unroll
    for (int i = 0; i < RUN<T>; ++i) {
      total.at[REACH + i] = parts[i / WIDTH<T>].at[i % WIDTH<T>];
    }
#pragma unroll
    for (int i = 0; i < REACH; ++i) {
      total.at[i] = head.at[i];
      total.at[REACH + RUN<T> + i] = tail.at[i];
    }
    return total;
  }

  // Channels a plane apart.
  __device__ __forceinline__ Values<float, RUN<T> + 2 * REACH> of_run(
      const Run& run, std::integral_constant<Path, Path::PLANES>) const {
    Values<float, RUN<T> + 2 * REACH> total = {};
    Run pooled = run;
    pooled.step = windows();
    visit_all(run.pixel, [&](int32_t covering, int32_t chosen) {
      pooled.begin = run.image * run.channels * windows() + covering;
      const auto code = load_run<Path::PLANES, T, REACH, int32_t>(codes, pooled);
      const auto value = load_run<Path::PLANES, T, REACH>(grad, pooled);
#pragma unroll
      for (int i = 0; i < RUN<T> + 2 * REACH; ++i) {
        if (code.at[i] == chosen) {
          total.at[i] += value.at[i];
        }
      }
    });
    return total;
  }

  __device__ __forceinline__ float of_element(int64_t, const Element& element, const Layout& layout) const {
    const int64_t first =
        element.image * layout.channels * windows() + element.channel * (layout.channels_last ? 1 : windows());
    float total = 0.0f;
    visit_all(element.pixel, [&](int32_t covering, int32_t chosen) {
      const int64_t at = first + covering * (layout.channels_last ? layout.channels : int64_t{1});
      total += codes[at] == chosen ? static_cast<float>(grad[at]) : 0.0f;
    });
    return total;
  }

 private:
  // Add the gradients of N channels whose winner is at `chosen`.
  template <int N>
  __device__ __forceinline__ void add(int64_t at, bool exist, int32_t chosen, Floats<N>& total) const {
    Pooled<T, N>(grad + at, codes + at, exist).add_won(chosen, total);
  }

  int32_t width_;
};

// A block's share: `patches` neighbouring patches of 2x2 pixels of an image, all their channels.
struct Patches {
  int32_t channels;
  int32_t patches, columns;  // of a block, and of a row
  int32_t across, down;      // blocks of a row, and rows
  int32_t vectors, runs;     // of a pixel
  int32_t padding_rows, padding_columns;
  Plane32 plane;
  SmallDivisor by_across, by_down, by_vectors, by_runs;
};

// The tensors of the pooled gradient.
template <class T>
struct Unpooled {
  const T* grad;
  const uint8_t* codes;
};

// channels_last, windows of SIDE x SIDE neighbours that lie two pixels apart.
template <class T, int SIDE>
__global__ void __launch_bounds__(LRN_THREADS)
    lrn_unpool_kernel(const T* __restrict__ x, Unpooled<T> unpooled, T* __restrict__ dx, Patches tile, LRN norm) {
  constexpr int N = WIDTH<T>, BEFORE = SIDE - 1;
  T* shared = reinterpret_cast<T*>(shared_memory());
  const auto block = static_cast<int32_t>(blockIdx.x), line = tile.by_across.quotient(block);
  const int32_t image = tile.by_down.quotient(line), row = line - image * tile.down;
  const int32_t first = (block - line * tile.across) * tile.patches, width = 2 * tile.patches;
  const int32_t count = tile.columns - first < tile.patches ? tile.columns - first : tile.patches;
  const int64_t windows = static_cast<int64_t>(image) * tile.plane.out_height * tile.plane.out_width;
  const T* grad = unpooled.grad + windows * tile.channels;
  const uint8_t* codes = unpooled.codes + windows * tile.channels;
  for (auto i = static_cast<int32_t>(threadIdx.x); i < count * tile.vectors; i += LRN_THREADS) {
    const int32_t patch = tile.by_vectors.quotient(i), channel = (i - patch * tile.vectors) * N;
    Pooled<T, N> pooled[BEFORE][BEFORE];
#pragma unroll
    for (int a = 0; a < BEFORE; ++a) {
      const int32_t oh = row - a, inside_row = into(oh, tile.plane.out_height);
#pragma unroll
      for (int b = 0; b < BEFORE; ++b) {
        const int32_t ow = first + patch - b, column = into(ow, tile.plane.out_width);
        const auto at = static_cast<uint32_t>((inside_row * tile.plane.out_width + column) * tile.channels + channel);
        pooled[a][b] = {advanced(grad, at, sizeof(T)), advanced(codes, at, 1), inside_row == oh && column == ow};
      }
    }
    T* to = shared + (2 * patch * tile.channels + channel);
    store_packed(to, gather<SIDE, 0>(pooled));
    store_packed(to + tile.channels, gather<SIDE, 1>(pooled));
    store_packed(to + width * tile.channels, gather<SIDE, 2>(pooled));
    store_packed(to + (width + 1) * tile.channels, gather<SIDE, 3>(pooled));
  }
  __syncthreads();
  const int32_t top = 2 * row - tile.padding_rows, left = 2 * first - tile.padding_columns;
  for (auto i = static_cast<int32_t>(threadIdx.x); i < 2 * width * tile.runs; i += LRN_THREADS) {
    const int32_t place = tile.by_runs.quotient(i), down = place < width ? 0 : 1;
    const int32_t h = top + down, right = place - down * width, w = left + right;
    if (h < 0 || h >= tile.plane.height || right >= 2 * count || w < 0 || w >= tile.plane.width) {
      continue;
    }
    const int64_t pixel = (static_cast<int64_t>(image) * tile.plane.height + h) * tile.plane.width + w;
    const int32_t channel = run_channel<T>(i - place * tile.runs, tile.channels);
    const Run run{pixel * tile.channels, 1, 0, 0, channel, tile.channels};
    const Run in_shared{place * tile.channels, 1, 0, 0, channel, tile.channels};
    const auto values = load_run<Path::VECTORS, T, 2 * REACH>(x, run);
    const auto gradients = load_run<Path::VECTORS, T, REACH>(static_cast<const T*>(shared), in_shared);
    store_run<Path::VECTORS>(dx, run, run_gradient<T>(norm, values, gradients));
  }
}

constexpr int64_t PATCH_BYTES = 32 * 1024;  // of a block's patches: several blocks to a multiprocessor

// Fill dx by patches; false if they do not serve the window, or one does not fit in shared memory.
template <class T>
bool by_patches(const Device& device, const Tensor& x, const Unpooled<T>& unpooled, Tensor& dx, const Layout& layout,
    const LRN& norm, const Window& window, const Plane& plane) {
  const int64_t side = side_of_patches(window), bytes = 4 * layout.channels * static_cast<int64_t>(sizeof(T));
  if (side == 0 || bytes > MOST_SHARED_BYTES || layout.channels * plane.out_height * plane.out_width > MOST_INDEX) {
    return false;
  }
  const int64_t columns = patches(window.columns, plane.width), down = patches(window.rows, plane.height);
  const int64_t across = ceil_div(columns, std::max<int64_t>(PATCH_BYTES / bytes, 1));
  Patches tile{};
  tile.channels = narrow(layout.channels);
  tile.patches = narrow(ceil_div(columns, across));
  tile.columns = narrow(columns);
  tile.across = narrow(across);
  tile.down = narrow(down);
  tile.vectors = narrow(layout.channels / WIDTH<T>);
  tile.runs = narrow(ceil_div(layout.channels, RUN<T>));
  tile.padding_rows = narrow(window.rows.padding);
  tile.padding_columns = narrow(window.columns.padding);
  tile.plane = narrow(plane);
  tile.by_across = across;
  tile.by_down = down;
  tile.by_vectors = tile.vectors;
  tile.by_runs = tile.runs;
  const auto kernel = side == 2 ? lrn_unpool_kernel<T, 2> : lrn_unpool_kernel<T, 3>;
  device.launch(kernel, layout.images * down * across, LRN_THREADS, tile.patches * bytes, data<T>(x), unpooled,
      mutable_data<T>(dx), tile, norm);
  return true;
}

}  // namespace

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
    const LRN norm = make_norm(size, alpha, beta, k, input.size(1));
    const Unpooled<T> unpooled{data<T>(from), data<uint8_t>(places)};
    if (path != Path::VECTORS || !by_patches<T>(device, x, unpooled, dx, sizes, norm, window, plane)) {
      const PooledGradient<T> source(unpooled.grad, unpooled.codes, window, plane);
      lrn_backward_into<T>(device, path, x, source, dx, sizes, norm);
    }
  });
  return dx;
}

}  // namespace fastcnn::cuda
