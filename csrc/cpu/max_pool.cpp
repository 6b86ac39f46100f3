// Max-pool: values and one-byte codes; max_pool_backward.cpp follows the codes back.
//
// NCHW with a small window: by max_pool_values.h where no codes are asked for, window by window where rows are too
// short for vectors. NCHW else: by max_pool_rows.h. NHWC: channels are the vectors, and a window's pixels are compared
// in turn.

#include "max_pool.h"

#include <array>
#include <bit>
#include <cstring>

#include "../ops.h"
#include "max_pool_rows.h"
#include "max_pool_values.h"
#include "threads.h"

namespace fastcnn::cpu {
namespace {

// Pool the planes [begin, end) of an NCHW tensor.
template <class T, bool CODES, bool RELU>
FASTCNN_CLONES void pool_planes(
    const T* x, T* y, uint8_t* codes, const Plane& plane, const Window& window, int64_t begin, int64_t end) {
  Rows<T, CODES> rows(window, plane);
  const Axis& axis = window.rows;
  const int32_t columns = static_cast<int32_t>(window.columns.size);
  std::vector<float> best(rows.count());
  std::vector<int32_t> winner(rows.count());
  std::vector<T> output(rows.count());
  std::vector<uint8_t> code(rows.count());
  for (int64_t p = begin; p < end; ++p) {
    rows.restart();
    for (int64_t o = 0; o < plane.out_height; ++o) {
      const int64_t first = first_pixel(axis, o);
      rows.reduce(
          x + p * plane.height * plane.width, std::max<int64_t>(first, 0), std::min(first + span(axis), plane.height));
      pool_row<T, CODES, RELU>(
          rows, axis, columns, o, plane.height, best.data(), winner.data(), output.data(), code.data());
      const int64_t at = (p * plane.out_height + o) * plane.out_width;
      std::memcpy(y + at, output.data(), plane.out_width * sizeof(T));
      if constexpr (CODES) {
        std::memcpy(codes + at, code.data(), plane.out_width);
      }
    }
  }
}

// The same without codes, for small windows.
template <class T, bool RELU>
FASTCNN_CLONES void pool_values(
    const T* x, T* y, const Plane& plane, const Window& window, int64_t begin, int64_t end) {
  ValuePlane<T, RELU> pooled(window, plane);
  for (int64_t p = begin; p < end; ++p) {
    pooled.pool(x + p * plane.height * plane.width, y + p * plane.out_height * plane.out_width);
  }
}

// Whether a plane's output rows are shorter than a vector is worth, given the columns of a window.
bool is_narrow(const Plane& plane, const Window& window) { return plane.out_width * window.columns.size <= 6; }

// The same with codes, for small windows, each by itself; without branches, which would be mispredicted.
template <class T, bool RELU>
void pool_windows(
    const T* x, T* y, uint8_t* codes, const Plane& plane, const Window& window, int64_t begin, int64_t end) {
  const Axis &rows = window.rows, &columns = window.columns;
  for (int64_t p = begin; p < end; ++p, x += plane.height * plane.width) {
    for (int64_t oh = 0; oh < plane.out_height; ++oh) {
      const int64_t top = first_pixel(rows, oh), r0 = std::max<int64_t>(-top, 0);
      const int64_t r1 = std::min(rows.size, plane.height - top);
      for (int64_t ow = 0; ow < plane.out_width; ++ow) {
        const int64_t left = first_pixel(columns, ow), s0 = std::max<int64_t>(-left, 0);
        const int64_t s1 = std::min(columns.size, plane.width - left);
        const bool some = r0 < r1 && s0 < s1;
        float best = some ? static_cast<float>(x[(top + r0) * plane.width + left + s0]) : LOWEST;
        uint32_t winner = some ? code_of(r0, s0, columns) : NO_PLACE;
        for (int64_t r = r0; r < r1; ++r) {
          for (int64_t s = s0; s < s1; ++s) {
            const float value = static_cast<float>(x[(top + r) * plane.width + left + s]);
            const uint32_t won = -static_cast<uint32_t>(wins(value, best)), kept = ~won;
            best =
                std::bit_cast<float>((std::bit_cast<uint32_t>(value) & won) | (std::bit_cast<uint32_t>(best) & kept));
            winner = (code_of(r, s, columns) & won) | (winner & kept);
          }
        }
        finish<T, true, RELU>(best, static_cast<int32_t>(winner), 0, y++, codes++);
      }
    }
  }
}

// Compare one more pixel of a window, all channels.
template <class T, bool CODES>
FASTCNN_HOST_DEVICE void take_pixel(
    const T* __restrict x, int32_t place, int64_t channels, float* __restrict best, int32_t* __restrict winner) {
  for (int64_t c = 0; c < channels; ++c) {
    const float value = static_cast<float>(x[c]);
    const bool won = wins(value, best[c]);
    best[c] = won ? value : best[c];
    if constexpr (CODES) {
      winner[c] = won ? place : winner[c];
    }
  }
}

// A window of SIDE x SIDE neighbours, all inside the image: all channels in one pass.
template <class T, bool CODES, int SIDE>
FASTCNN_HOST_DEVICE void take_square(
    const T* __restrict x, int64_t row, int64_t channels, float* __restrict best, int32_t* __restrict winner) {
  for (int64_t c = 0; c < channels; ++c) {
    float value = static_cast<float>(x[c]);
    int32_t code = 0;
#pragma GCC unroll 9
    for (int place = 1; place < SIDE * SIDE; ++place) {
      take(static_cast<float>(x[place / SIDE * row + place % SIDE * channels + c]), place, value, code);
    }
    best[c] = value;
    if constexpr (CODES) {
      winner[c] = code;
    }
  }
}

// Pool the output rows [begin, end), counted over all images, of an NHWC tensor.
template <class T, bool CODES, bool RELU>
FASTCNN_CLONES void pool_pixels(const T* x, T* y, uint8_t* codes, const Plane& plane, int64_t channels,
    const Window& window, int64_t begin, int64_t end) {
  const Axis &rows = window.rows, &columns = window.columns;
  const bool close = rows.dilation == 1 && columns.dilation == 1;
  const int64_t square = close && rows.size == columns.size ? rows.size : 0;
  std::vector<float> best(channels);
  std::vector<int32_t> winner(channels);
  for (int64_t line = begin; line < end; ++line) {
    const int64_t image = line / plane.out_height, oh = line % plane.out_height;
    const T* from = x + image * plane.height * plane.width * channels;
    const int64_t r0 = first_place(rows, oh), r1 = end_place(rows, oh, plane.height), top = first_pixel(rows, oh);
    for (int64_t ow = 0; ow < plane.out_width; ++ow) {
      const int64_t s0 = first_place(columns, ow), s1 = end_place(columns, ow, plane.width);
      const int64_t left = first_pixel(columns, ow);
      T* output = y + (line * plane.out_width + ow) * channels;
      uint8_t* code = CODES ? codes + (line * plane.out_width + ow) * channels : nullptr;
      const bool inside = r1 - r0 == square && s1 - s0 == square;
      const T* corner = from + (top * plane.width + left) * channels;
      if (inside && square == 2) {
        take_square<T, CODES, 2>(corner, plane.width * channels, channels, best.data(), winner.data());
      } else if (inside && square == 3) {
        take_square<T, CODES, 3>(corner, plane.width * channels, channels, best.data(), winner.data());
      } else {
        std::fill(best.begin(), best.end(), LOWEST);
        std::fill(winner.begin(), winner.end(), r0 < r1 && s0 < s1 ? code_of(r0, s0, columns) : NO_PLACE);
        for (int64_t r = r0; r < r1; ++r) {
          for (int64_t s = s0; s < s1; ++s) {
            const int64_t pixel = (top + r * rows.dilation) * plane.width + left + s * columns.dilation;
            take_pixel<T, CODES>(from + pixel * channels, code_of(r, s, columns), channels, best.data(), winner.data());
          }
        }
      }
      for (int64_t c = 0; c < channels; ++c) {
        finish<T, CODES, RELU>(best[c], winner[c], c, output, code);
      }
    }
  }
}

template <class T, bool CODES, bool RELU>
void run_pool(const T* x, T* y, uint8_t* codes, const Plane& plane, const Layout& layout, const Window& window) {
  if (layout.channels_last) {
    const int64_t cost = plane.out_width * layout.channels * window.rows.size * window.columns.size;
    parallel(layout.images * plane.out_height, cost, [&](int64_t begin, int64_t end) {
      pool_pixels<T, CODES, RELU>(x, y, codes, plane, layout.channels, window, begin, end);
    });
  } else if (!CODES && is_small(window)) {
    parallel(layout.images * layout.channels, layout.pixels,
        [&](int64_t begin, int64_t end) { pool_values<T, RELU>(x, y, plane, window, begin, end); });
  } else if (CODES && is_small(window) && is_narrow(plane, window)) {
    const int64_t pixels = plane.height * plane.width, outputs = plane.out_height * plane.out_width;
    parallel(layout.images * layout.channels, layout.pixels, [&](int64_t begin, int64_t end) {
      const int64_t at = begin * outputs;
      pool_windows<T, RELU>(x + begin * pixels, y + at, codes + at, plane, window, begin, end);
    });
  } else {
    parallel(layout.images * layout.channels, layout.pixels,
        [&](int64_t begin, int64_t end) { pool_planes<T, CODES, RELU>(x, y, codes, plane, window, begin, end); });
  }
}

}  // namespace

template <class T>
void pool_into(
    const T* x, T* y, uint8_t* codes, const Plane& plane, const Layout& layout, const Window& window, bool relu) {
  if (codes) {
    relu ? run_pool<T, true, true>(x, y, codes, plane, layout, window)
         : run_pool<T, true, false>(x, y, codes, plane, layout, window);
  } else {
    relu ? run_pool<T, false, true>(x, y, codes, plane, layout, window)
         : run_pool<T, false, false>(x, y, codes, plane, layout, window);
  }
}

#define FASTCNN_POOL(T) \
  template void pool_into(const T*, T*, uint8_t*, const Plane&, const Layout&, const Window&, bool)
FASTCNN_POOL(float);
FASTCNN_POOL(BFloat16);
FASTCNN_POOL(Half);
#undef FASTCNN_POOL

std::pair<Tensor, Tensor> pool(const Tensor& input, const Window& window, bool relu, bool codes) {
  STD_TORCH_CHECK(input.dim() == 4, "max_pool: expected (N, C, H, W), got ", input.dim(), " axes");
  const bool channels_last = is_channels_last(input);
  const Tensor x = dense(input, channels_last);
  const Layout shape = layout(x, channels_last);
  const Plane plane = make_plane(window, x.size(2), x.size(3));
  const std::array<int64_t, 4> sizes{shape.images, shape.channels, plane.out_height, plane.out_width};
  Tensor y = new_tensor(x, sizes, x.scalar_type(), channels_last);
  Tensor code = codes ? new_tensor(x, sizes, torch::headeronly::ScalarType::Byte, channels_last) : y;
  if (y.numel() > 0) {
    with_type("max_pool", x, [&](auto type) {
      using T = decltype(type);
      uint8_t* places = codes ? mutable_data<uint8_t>(code) : nullptr;
      pool_into(data<T>(x), mutable_data<T>(y), places, plane, shape, window, relu);
    });
  }
  return {y, code};
}

Tensor max_pool(const Tensor& input, const Window& window) { return pool(input, window, false, false).first; }

std::tuple<Tensor, Tensor> max_pool_codes(const Tensor& input, const Window& window) {
  return pool(input, window, false, true);
}

}  // namespace fastcnn::cpu
