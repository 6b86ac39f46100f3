// Max-pool's backward: each pixel gathers from the windows over it whose codes name it, so that there is nothing to
// clear first and no two threads meet; with the sums for a bias gradient in the same pass if asked.

#include "../ops.h"
#include "launch.h"
#include "max_pool.h"
#include "sums.h"
#include "vector.h"
#include "walk.h"

namespace fastcnn::cuda {
namespace {

// Gradients and codes of one window.
template <class T, int N>
struct Pooled {
  Floats<N> grad;
  int32_t code[N];
};

// The gradients and codes at an offset, or codes that name no place if the window does not exist.
template <class T, int N, class Offset>
__device__ __forceinline__ Pooled<T, N> load_pooled(const T* grad, const uint8_t* codes, Offset at, bool exists) {
  Pooled<T, N> pooled{load<N>(grad + at), {}};
  const Vector<uint8_t, N> code = load_packed<N>(codes + at);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    pooled.code[i] = exists ? code.at[i] : RELU_OFF;
  }
  return pooled;
}

// Add the gradients whose winner is at `code`.
template <class T, int N>
__device__ __forceinline__ void add_won(const Pooled<T, N>& pooled, int32_t code, Floats<N>& total) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (pooled.code[i] == code) {
      total.at[i] += pooled.grad.at[i];
    }
  }
}

template <class T, int N>
__device__ __forceinline__ void add_flowing(const Pooled<T, N>& pooled, Floats<N>& sum) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    sum.at[i] += pooled.code[i] == RELU_OFF ? 0.0f : pooled.grad.at[i];
  }
}

constexpr int64_t UNPOOL_DEPTH = 4;  // patches or pixels of a thread at least

// How many patches of two pixels an axis has, the first one shifted into the padding.
template <class Int>
FASTCNN_HOST_DEVICE Int patches(const AxisOf<Int>& axis, Same<Int> length) {
  return ceil_div(length + axis.padding, 2);
}

// Windows of SIDE x SIDE neighbours at a stride of 2, SIDE 2 or 3. A place is a patch of 2x2 pixels: patch (i, j) lies
// under window (i, j), its places 0 and 1, and if SIDE is 3 also under window i - 1 or j - 1, its place 2.
template <class T, int N, int SIDE>
__global__ void __launch_bounds__(BLOCK_THREADS, SIDE == 2 ? 3 : 2) unpool_patches_kernel(const T* __restrict__ grad,
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
        pooled[a][b] = load_pooled<T, N>(image_grad, image_codes, offset, row == oh && column == ow);
      }
    }
    if (partials != nullptr) {
      add_flowing(pooled[0][0], sum);  // every window is the first of one patch
    }
    const int top = first_pixel(window.rows, at.row), left = first_pixel(window.columns, at.column);
#pragma unroll
    for (int pixel = 0; pixel < 4; ++pixel) {
      const int h = top + pixel / 2, w = left + pixel % 2;
      Floats<N> total{};
#pragma unroll
      for (int a = 0; a < REACH; ++a) {
#pragma unroll
        for (int b = 0; b < REACH; ++b) {
          const int r = pixel / 2 + 2 * a, s = pixel % 2 + 2 * b;
          if (r < SIDE && s < SIDE) {
            add_won(pooled[a][b], r * SIDE + s, total);
          }
        }
      }
      if (h >= 0 && h < plane.height && w >= 0 && w < plane.width) {
        store(image_dx + (static_cast<uint32_t>(h) * to.line + static_cast<uint32_t>(w) * to.pixel), total);
      }
    }
    route.advance();
  }
  if (partials != nullptr) {
    leave_sums(sum, partials, walks, walk);
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
          add_won(
              load_pooled<T, N>(grad, codes, pixel * walks.stride + walk.offset, true), code_of(r, s, columns), total);
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

// The side of a window that patches serve, or 0.
int64_t side_of(const Window& window) {
  const auto fits = [](const Axis& axis, int64_t side) {
    return axis.size == side && axis.stride == 2 && axis.dilation == 1;
  };
  for (int64_t side : {2, 3}) {
    if (fits(window.rows, side) && fits(window.columns, side)) {
      return side;
    }
  }
  return 0;
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

template <class T, int N>
Tensor run_unpool(const Unpool& call, bool bias_grad) {
  const Device device(call.grad);
  const auto& [images, channels, pixels, channels_last] = call.layout;
  const auto& [height, width, out_height, out_width] = call.plane;
  const int64_t stride = channels_last ? channels : 1;
  const PlaneStrides from(out_height, out_width, stride), to(height, width, stride);
  const bool small = from.image > 0 && to.image <= MOST_OFFSETS && from.image <= MOST_OFFSETS;
  const int64_t side = small ? side_of(call.window) : 0;
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
