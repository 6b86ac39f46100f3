// Max-pool's backward: each pixel gathers from the windows over it whose codes name it, so that there is nothing to
// clear first and no two threads meet; with the sums for a bias gradient in the same pass if asked.

#include "../ops.h"
#include "launch.h"
#include "max_pool.h"
#include "pooled.h"
#include "strips.h"
#include "sums.h"
#include "vector.h"
#include "walk.h"

namespace fastcnn::cuda {
namespace {

constexpr int64_t UNPOOL_DEPTH = 4;  // patches or pixels of a thread at least

// Windows of SIDE x SIDE neighbours at a stride of 2, SIDE 2 or 3. A place is a patch of 2x2 pixels: patch (i, j) lies
// under window (i, j), its places 0 and 1, and if SIDE is 3 also under window i - 1 or j - 1, its place 2.
template <class T, int N, int SIDE>
__global__ void __launch_bounds__(BLOCK_THREADS, 3) unpool_patches_kernel(const T* __restrict__ grad,
    const uint8_t* __restrict__ codes, T* __restrict__ dx, float* partials, Window32 window, Plane32 plane,
    PlaneStrides from, PlaneStrides to, RouteSteps steps, Walks walks) {
  constexpr int REACH = SIDE - 1;  // windows over a patch, by axis
  const Walk walk = start_walk<N>(walks);
  Route route(walks, walk, steps);
  Floats<N> sum{};
  for (int place = walk.place; place < walk.end; place += walks.rows) {
    const Position& at = route.at;
    const T* image_grad = grad + walk.offset + at.image * from.image;
    const uint8_t* image_codes = codes + walk.offset + at.image * from.image;
    T* image_dx = dx + walk.offset + at.image * to.image;
    Pooled<T, N> pooled[REACH][REACH];
#pragma unroll
    for (int a = 0; a < REACH; ++a) {
      const int oh = at.row - a, row = into(oh, plane.out_height);
#pragma unroll
      for (int b = 0; b < REACH; ++b) {
        const int ow = at.column - b, column = into(ow, plane.out_width);
        const uint32_t offset = static_cast<uint32_t>(row) * from.line + static_cast<uint32_t>(column) * from.pixel;
        pooled[a][b] = {
            advanced(image_grad, offset, sizeof(T)), advanced(image_codes, offset, 1), row == oh && column == ow};
      }
    }
    if (partials != nullptr) {
      pooled[0][0].add_flowing(sum);  // every window is the first of one patch
    }
    const int top = first_pixel(window.rows, at.row), left = first_pixel(window.columns, at.column);
    T* corner = image_dx + (static_cast<int64_t>(top) * to.line + static_cast<int64_t>(left) * to.pixel);
    const bool rows[] = {top >= 0, top + 1 < plane.height}, columns[] = {left >= 0, left + 1 < plane.width};
    const auto put = [&](int row, int column, const Vector<T, N>& values) {
      if (rows[row] && columns[column]) {
        T* line = row == 0 ? corner : advanced(corner, to.line, sizeof(T));
        store_packed(column == 0 ? line : advanced(line, to.pixel, sizeof(T)), values);
      }
    };
    put(0, 0, gather<SIDE, 0>(pooled));
    put(0, 1, gather<SIDE, 1>(pooled));
    put(1, 0, gather<SIDE, 2>(pooled));
    put(1, 1, gather<SIDE, 3>(pooled));
    route.advance();
  }
  if (partials != nullptr) {
    leave_sums(sum, partials, walks, walk);
  }
}

// The same in NCHW. A thread has a column of patches and goes down a strip of them, by two at once: their values share
// an instruction where they have 16 bits. SUMS: leave those for a bias gradient in `partials`.
template <class T, int SIDE, bool SUMS>
__global__ void __launch_bounds__(BLOCK_THREADS, 4)
    unpool_strips_kernel(const T* __restrict__ grad, const uint8_t* __restrict__ codes, T* __restrict__ dx,
        float* partials, Window32 window, Plane32 plane, Strips strips, Walks walks) {
  constexpr int REACH = SIDE - 1;
  const Strip strip(strips);
  Floats<2> sum{};
  if (strip.row < strip.end) {
    const int left = first_pixel(window.columns, strip.column);
    bool exists[REACH];
#pragma unroll
    for (int b = 0; b < REACH; ++b) {
      exists[b] = strip.column - b >= 0 && strip.column - b < plane.out_width;
    }
    const int64_t from =
        int64_t{strip.plane} * (plane.out_height * plane.out_width) + (strip.row * plane.out_width + strip.column);
    const T* row_grad = grad + from;
    const uint8_t* row_codes = codes + from;
    Vector<T, 2> values[REACH];  // of the windows of two rows
    uint32_t places[REACH][2];
    // A window's gradient and code, which names no place if there is no such window.
    const auto load_window = [&](int i, int b, const T* its_grad, const uint8_t* its_codes, bool row_exists) {
      values[b].at[i] = static_cast<T>(0.0f);
      places[b][i] = RELU_OFF;
      if (row_exists && exists[b]) {
        values[b].at[i] = *(its_grad - b);
        places[b][i] = *(its_codes - b);
      }
    };
#pragma unroll
    for (int b = 0; b < REACH; ++b) {
      load_window(1, b, row_grad - plane.out_width, row_codes - plane.out_width, strip.row > 0);
    }
    int top = first_pixel(window.rows, strip.row);
    T* to = dx + (int64_t{strip.plane} * (plane.height * plane.width) + (top * plane.width + left));
    // Whether the two pixels of an even or an odd row of the patches are stored at once, or which alone.
    bool both[2], first[2], second[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      first[i] = left >= 0;
      second[i] = left + 1 < plane.width;
      both[i] = first[i] && second[i] && is_aligned(to + i * plane.width, 2 * sizeof(T));
      first[i] &= !both[i];
      second[i] &= !both[i];
    }
#pragma unroll 1
    for (int row = strip.row; row < strip.end; row += 2) {
      Pooled<T, 2> pooled[REACH][REACH];
#pragma unroll
      for (int b = 0; b < REACH; ++b) {
        const T value_before = values[b].at[1];
        const uint32_t place_before = places[b][1];
        load_window(0, b, row_grad, row_codes, row < plane.out_height);
        load_window(1, b, row_grad + plane.out_width, row_codes + plane.out_width, row + 1 < plane.out_height);
        pooled[0][b] = {values[b], places[b][0], places[b][1]};
        if constexpr (SIDE == 3) {
          pooled[1][b] = {{value_before, values[b].at[0]}, place_before, places[b][0]};
        }
      }
      if constexpr (SUMS) {
        pooled[0][0].add_flowing(sum);
      }
      const Vector<T, 2> pixels[2][2] = {
          {gather<SIDE, 0>(pooled), gather<SIDE, 1>(pooled)}, {gather<SIDE, 2>(pooled), gather<SIDE, 3>(pooled)}};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const T a = pixels[i % 2][0].at[i / 2], b = pixels[i % 2][1].at[i / 2];
        const bool inside = (i > 0 || top >= 0) && top + i < plane.height;
        T* line = to + i * plane.width;
        if (inside && both[i % 2]) {
          store_packed(line, Vector<T, 2>{a, b});
        }
        if (inside && first[i % 2]) {
          line[0] = a;
        }
        if (inside && second[i % 2]) {
          line[1] = b;
        }
      }
      row_grad += 2 * plane.out_width;
      row_codes += 2 * plane.out_width;
      to += 4 * plane.width;
      top += 4;
    }
  }
  if constexpr (SUMS) {
    leave_sums(Floats<1>{sum.at[0] + sum.at[1]}, partials, walks, strip.walk());
  }
}

// Any window; a place is a pixel.
template <class T, int N>
__global__ void __launch_bounds__(BLOCK_THREADS) unpool_pixels_kernel(const T* grad, const uint8_t* codes, T* dx,
    float* partials, Window32 window, Plane32 plane, RouteSteps steps, Walks walks) {
  const Walk walk = start_walk<N>(walks);
  const auto &rows = window.rows, &columns = window.columns;
  Route route(walks, walk, steps);
  int64_t to = walk.at;
  Floats<N> sum{};
  for (int place = walk.place; place < walk.end; place += walks.rows) {
    const Position& at = route.at;
    const int bottom = last_window(rows, at.row, plane.out_height);
    const int right = last_window(columns, at.column, plane.out_width);
    Floats<N> total{};
#pragma unroll 1
    for (int oh = first_window(rows, at.row); oh <= bottom; ++oh) {
      const int r = place_at(rows, oh, at.row);
#pragma unroll 1
      for (int ow = first_window(columns, at.column); ow <= right; ++ow) {
        const int s = place_at(columns, ow, at.column);
        const int64_t pixel = (at.image * plane.out_height + oh) * plane.out_width + ow;
        if (r >= 0 && s >= 0) {
          const int64_t at = pixel * walks.stride + walk.offset;
          Pooled<T, N>(grad + at, codes + at).add_won(code_of(r, s, columns), total);
        }
      }
    }
    store(dx + to, total);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      sum.at[i] += total.at[i];
    }
    to += walks.rows * walks.stride;
    route.advance();
  }
  if (partials != nullptr) {
    leave_sums(sum, partials, walks, walk);
  }
}

// The tensors of one call, dense.
struct Unpool {
  const Tensor& grad;
  const Tensor& codes;
  Tensor& dx;
  Layout layout;
  Window window;
  Plane plane;
};

template <class T>
Tensor run_strips(const Device& device, const Unpool& call, int64_t side, bool bias_grad) {
  const auto& [images, channels, pixels, channels_last] = call.layout;
  const Strips strips = make_strips(images, channels, patches(call.window.rows, call.plane.height),
      patches(call.window.columns, call.plane.width), 2, 1);
  const Walks walks = walks_of(strips);
  Partials partials = new_partials(call.grad, walks, bias_grad);
  const auto kernel = bias_grad ? (side == 2 ? unpool_strips_kernel<T, 2, true> : unpool_strips_kernel<T, 3, true>)
                                : (side == 2 ? unpool_strips_kernel<T, 2, false> : unpool_strips_kernel<T, 3, false>);
  device.launch(kernel, walks.blocks(), walks.threads, bias_grad ? shared_bytes_of_sums(walks, 1) : 0,
      data<T>(call.grad), data<uint8_t>(call.codes), mutable_data<T>(call.dx),
      bias_grad ? mutable_data<float>(partials.sums) : nullptr, narrow(call.window), narrow(call.plane), strips, walks);
  return add_partials(device, partials, call.grad, bias_grad);
}

template <class T, int N>
Tensor run_unpool(const Unpool& call, bool bias_grad) {
  const Device device(call.grad);
  const auto& [images, channels, pixels, channels_last] = call.layout;
  const auto& [height, width, out_height, out_width] = call.plane;
  const int64_t stride = channels_last ? channels : 1;
  const PlaneStrides from(out_height, out_width, stride), to(height, width, stride);
  const bool small = from.image > 0 && to.image <= MOST_OFFSETS && from.image <= MOST_OFFSETS;
  const int64_t side = small ? side_of_patches(call.window) : 0;
  if (!channels_last && side > 0 && pixels > 0 && pixels < MOST_PLACES) {
    return run_strips<T>(device, call, side, bias_grad);
  }
  const int64_t down = side == 0 ? height : patches(call.window.rows, height);
  const int64_t across = side == 0 ? width : patches(call.window.columns, width);
  const Walks walks = make_walks(images, channels, pixels == 0 ? 0 : down * across, channels_last, N, stride,
      UNPOOL_DEPTH, bias_grad ? MOST_SUMS : MOST_BLOCKS);
  Partials partials = new_partials(call.grad, walks, bias_grad);
  const int64_t shared_bytes = bias_grad ? shared_bytes_of_sums(walks, N) : 0;
  const RouteSteps steps(walks, down, across);
  const auto launch = [&](auto kernel, const auto&... strides) {
    device.launch(kernel, walks.blocks(), walks.threads, shared_bytes, data<T>(call.grad), data<uint8_t>(call.codes),
        mutable_data<T>(call.dx), bias_grad ? mutable_data<float>(partials.sums) : nullptr, narrow(call.window),
        narrow(call.plane), strides..., steps, walks);
  };
  if (side == 0) {
    launch(unpool_pixels_kernel<T, N>);
  } else {
    launch(side == 2 ? unpool_patches_kernel<T, N, 2> : unpool_patches_kernel<T, N, 3>, from, to);
  }
  return add_partials(device, partials, call.grad, bias_grad);
}

}  // namespace

std::pair<Tensor, Tensor> pool_backward(
    const Tensor& grad, const Tensor& codes, int64_t height, int64_t width, const Window& window, bool bias_grad) {
  STD_TORCH_CHECK(
      codes.dim() == 4 && grad.dim() == 4, "max_pool_backward: expected gradients and codes (N, C, OH, OW)");
  for (int64_t axis = 0; axis < 4; ++axis) {
    STD_TORCH_CHECK(grad.size(axis) == codes.size(axis), "max_pool_backward: gradients and codes differ in shape");
  }
  const bool channels_last = is_channels_last(codes);
  const Tensor from = dense(grad, channels_last), code = dense(codes, channels_last);
  const int64_t images = codes.size(0), channels = codes.size(1);
  const std::vector<int64_t> sizes{images, channels, height, width};
  Tensor dx = new_tensor(grad, sizes, grad.scalar_type(), channels_last), bias;
  const Unpool call{from, code, dx, {images, channels, height * width, channels_last}, window,
      {height, width, codes.size(2), codes.size(3)}};
  const bool aligned = are_aligned({&from, &code, &dx});
  with_type("max_pool_backward", from, [&](auto type) {
    using T = decltype(type);
    const bool vectors = aligned && channels_last && channels % WIDTH<T> == 0;
    bias = vectors ? run_unpool<T, WIDTH<T>>(call, bias_grad) : run_unpool<T, 1>(call, bias_grad);
  });
  return {dx, bias};
}

Tensor max_pool_backward(const Tensor& grad, const Tensor& codes, int64_t height, int64_t width, const Window& window) {
  return pool_backward(grad, codes, height, width, window, false).first;
}

}  // namespace fastcnn::cuda
