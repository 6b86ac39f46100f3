// Max-pool: values and one-byte codes; max_pool_backward.cpp follows the codes back.
//
// NCHW: every input row is reduced to the winners of its windows' columns, once, and output rows then take the winners
// of those. Columns are first dealt out by stride, so that each place of a window is a contiguous vector. Scanning
// columns inside rows keeps torch's order: the first of equals wins, and the last NaN.
// NHWC: channels are the vectors, and a window's pixels are compared in turn.

#include "max_pool.h"

#include <cstring>
#include <limits>
#include <type_traits>

#include "../math/select.h"
#include "../ops.h"
#include "threads.h"

namespace fastcnn::cpu {
namespace {

constexpr float LOWEST = -std::numeric_limits<float>::infinity();
// The code of a window that covers no pixel; more than RELU_OFF whatever row is added, and stored as RELU_OFF.
constexpr int32_t NO_PLACE = 1 << 16;
constexpr int64_t LANES = 16;

FASTCNN_HOST_DEVICE void take(float value, int32_t place, float& best, int32_t& code) {
  const bool won = wins(value, best);
  best = won ? value : best;
  code = won ? place : code;
}

// The winners of the windows' columns, for the input rows that an output row needs; rows are reduced once.
template <class T, bool CODES>
class Rows {
 public:
  Rows(const Window& window, const Plane& plane)
      : window_(window),
        plane_(plane),
        outside_(plane.width + window.columns.padding),
        stride_(std::min(window.columns.stride, outside_)),
        count_(round_up(plane.out_width, LANES)),
        phase_(count_ + std::min(span(window.columns) - 1, outside_) / stride_ + LANES),
        kept_(std::min(span(window.rows), plane.height)),
        dealt_(stride_ * phase_, LOWEST),
        best_(kept_ * count_, LOWEST),
        code_(CODES ? kept_ * count_ : 0, NO_PLACE) {}

  int64_t count() const { return count_; }
  const float* best(int64_t row) const { return best_.data() + row % kept_ * count_; }
  const int32_t* code(int64_t row) const { return CODES ? code_.data() + row % kept_ * count_ : nullptr; }

  void restart() { done_ = 0; }

  // Reduce the rows up to `end` that a window needs and that are not reduced yet; it begins at row `begin`.
  FASTCNN_HOST_DEVICE void reduce(const T* x, int64_t begin, int64_t end) {
    for (int64_t row = std::max(done_, begin); row < end; ++row) {
      deal(x + row * plane_.width);
      float* best = best_.data() + row % kept_ * count_;
      int32_t* code = CODES ? code_.data() + row % kept_ * count_ : nullptr;
      const int64_t places = window_.columns.dilation == 1 ? window_.columns.size : 0;
      if (places == 2) {
        reduce_row<2>(best, code);
      } else if (places == 3) {
        reduce_row<3>(best, code);
      } else {
        reduce_row_by_places(best, code);
      }
      mend_border(best, code);
    }
    done_ = std::max(done_, end);
  }

 private:
  // Column w of the image lies at (w + padding) / stride of the phase (w + padding) % stride.
  FASTCNN_HOST_DEVICE void deal(const T* __restrict x) {
    const int64_t width = plane_.width, padding = window_.columns.padding;
    float* __restrict dealt = dealt_.data();
    if (stride_ == 1) {
      for (int64_t w = 0; w < width; ++w) {
        dealt[padding + w] = static_cast<float>(x[w]);
      }
    } else if (stride_ == 2) {
      float* __restrict even = dealt + padding % 2 * phase_ + padding / 2;
      float* __restrict odd = dealt + (padding + 1) % 2 * phase_ + (padding + 1) / 2;
      for (int64_t i = 0; i < width / 2; ++i) {
        even[i] = static_cast<float>(x[2 * i]);
        odd[i] = static_cast<float>(x[2 * i + 1]);
      }
      if (width % 2) {
        even[width / 2] = static_cast<float>(x[width - 1]);
      }
    } else {
      for (int64_t w = 0; w < width; ++w) {
        dealt[(w + padding) % stride_ * phase_ + (w + padding) / stride_] = static_cast<float>(x[w]);
      }
    }
  }

  // The values of one place of all windows.
  FASTCNN_HOST_DEVICE const float* place(int64_t s) const {
    const int64_t column = std::min(s * window_.columns.dilation, outside_);
    return dealt_.data() + column % stride_ * phase_ + column / stride_;
  }

  template <int PLACES>
  FASTCNN_HOST_DEVICE void reduce_row(float* __restrict best, int32_t* __restrict code) {
    const float* __restrict first = place(0);
    const float* __restrict second = place(1);
    const float* __restrict third = place(PLACES - 1);
    const int64_t count = round_up(count_, LANES);
    for (int64_t i = 0; i < count; ++i) {
      float value = first[i];
      int32_t winner = 0;
      take(second[i], 1, value, winner);
      if constexpr (PLACES == 3) {
        take(third[i], 2, value, winner);
      }
      best[i] = value;
      if constexpr (CODES) {
        code[i] = winner;
      }
    }
  }

  FASTCNN_HOST_DEVICE void reduce_row_by_places(float* __restrict best, int32_t* __restrict code) {
    const int64_t count = round_up(count_, LANES);
    std::memcpy(best, place(0), count * sizeof(float));
    if constexpr (CODES) {
      std::memset(code, 0, count * sizeof(int32_t));
    }
    for (int64_t s = 1; s < window_.columns.size; ++s) {
      const float* __restrict value = place(s);
      const int32_t column = static_cast<int32_t>(s);
      for (int64_t i = 0; i < count; ++i) {
        const bool won = wins(value[i], best[i]);
        best[i] = won ? value[i] : best[i];
        if constexpr (CODES) {
          code[i] = won ? column : code[i];
        }
      }
    }
  }

  // Windows that reach into the padding, once more and over their places inside the image alone: padding never wins,
  // not over -infinity either.
  FASTCNN_HOST_DEVICE void mend_border(float* best, int32_t* code) {
    const int64_t begin = first_inside(window_.columns, plane_.out_width);
    const int64_t end = std::max(begin, end_inside(window_.columns, plane_.out_width, plane_.width));
    for (int64_t i = 0; i < begin; ++i) {
      mend(i, best, code);
    }
    for (int64_t i = end; i < plane_.out_width; ++i) {
      mend(i, best, code);
    }
  }

  void mend(int64_t i, float* best, int32_t* code) {
    const int64_t end = end_place(window_.columns, i, plane_.width);
    best[i] = LOWEST;
    int32_t winner = NO_PLACE;
    for (int64_t s = first_place(window_.columns, i); s < end; ++s) {
      const float value = place(s)[i];
      const bool won = winner == NO_PLACE || wins(value, best[i]);
      best[i] = won ? value : best[i];
      winner = won ? static_cast<int32_t>(s) : winner;
    }
    if constexpr (CODES) {
      code[i] = winner;
    }
  }

  const Window& window_;
  const Plane& plane_;
  int64_t outside_;  // a column, counted from the padding's first, that is in no image, nor any behind it
  int64_t stride_;   // at most that: a larger one leaves a single window
  int64_t count_;
  int64_t phase_;
  int64_t kept_;
  int64_t done_ = 0;
  std::vector<float> dealt_;
  std::vector<float> best_;
  std::vector<int32_t> code_;
};

// Turn the best of each window, and its place, into an output row.
template <class T, bool CODES, bool RELU>
FASTCNN_HOST_DEVICE void finish(
    float value, int32_t winner, int64_t i, T* __restrict output, uint8_t* __restrict code) {
  if constexpr (CODES) {
    winner = winner < RELU_OFF ? winner : RELU_OFF;
    code[i] = static_cast<uint8_t>(RELU && relu_off(value) ? RELU_OFF : winner);
  }
  output[i] = static_cast<T>(RELU ? relu(value) : value);
}

// Reduce the rows of one output row's windows: whole vectors, so `output` and `code` have room for `rows.count()`.
template <class T, bool CODES, bool RELU>
FASTCNN_HOST_DEVICE void pool_row(const Rows<T, CODES>& rows, const Axis& axis, int32_t columns, int64_t window,
    int64_t height, float* __restrict best, int32_t* __restrict winner, T* __restrict output,
    uint8_t* __restrict code) {
  const int64_t begin = first_place(axis, window), end = end_place(axis, window, height);
  const int64_t first = first_pixel(axis, window);
  const int64_t count = round_up(rows.count(), LANES);
  if (begin >= end) {
    for (int64_t i = 0; i < count; ++i) {
      finish<T, CODES, RELU>(LOWEST, NO_PLACE, i, output, code);
    }
    return;
  }
  const float* __restrict a = rows.best(first + begin * axis.dilation);
  const int32_t* __restrict a_code = rows.code(first + begin * axis.dilation);
  const int32_t a_row = static_cast<int32_t>(begin) * columns;
  const int64_t last = end - 1;
  if (end - begin <= 3) {
    const int64_t middle = begin + (end - begin == 3 ? 1 : 0);
    const float* __restrict b = rows.best(first + middle * axis.dilation);
    const int32_t* __restrict b_code = rows.code(first + middle * axis.dilation);
    const float* __restrict c = rows.best(first + last * axis.dilation);
    const int32_t* __restrict c_code = rows.code(first + last * axis.dilation);
    const int32_t b_row = static_cast<int32_t>(middle) * columns, c_row = static_cast<int32_t>(last) * columns;
    for (int64_t i = 0; i < count; ++i) {  // a row that stands twice does not change its own winner
      float value = a[i];
      int32_t place = CODES ? a_row + a_code[i] : 0;
      take(b[i], CODES ? b_row + b_code[i] : 0, value, place);
      take(c[i], CODES ? c_row + c_code[i] : 0, value, place);
      finish<T, CODES, RELU>(value, place, i, output, code);
    }
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    best[i] = a[i];
    winner[i] = CODES ? a_row + a_code[i] : 0;
  }
  for (int64_t r = begin + 1; r < end; ++r) {
    const float* __restrict b = rows.best(first + r * axis.dilation);
    const int32_t* __restrict b_code = rows.code(first + r * axis.dilation);
    const int32_t b_row = static_cast<int32_t>(r) * columns;
    for (int64_t i = 0; i < count; ++i) {
      take(b[i], CODES ? b_row + b_code[i] : 0, best[i], winner[i]);
    }
  }
  for (int64_t i = 0; i < count; ++i) {
    finish<T, CODES, RELU>(best[i], winner[i], i, output, code);
  }
}

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
  const std::vector<int64_t> sizes{shape.images, shape.channels, plane.out_height, plane.out_width};
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

Tensor max_pool(const Tensor& input, Sizes size, Sizes stride, Sizes padding, Sizes dilation, bool ceil_mode) {
  return pool(input, make_window(size, stride, padding, dilation, ceil_mode), false, false).first;
}

std::tuple<Tensor, Tensor> max_pool_codes(
    const Tensor& input, Sizes size, Sizes stride, Sizes padding, Sizes dilation, bool ceil_mode) {
  return pool(input, make_window(size, stride, padding, dilation, ceil_mode), false, true);
}

}  // namespace fastcnn::cpu
