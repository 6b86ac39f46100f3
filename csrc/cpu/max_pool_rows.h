#pragma once
// Max-pool of NCHW planes with codes, or with any window: every input row is reduced to the winners of its windows'
// columns, once, and output rows then take the winners of those. Columns are first dealt out by stride, so that each
// place of a window is a contiguous vector. Scanning columns inside rows keeps torch's order: the first of equals wins,
// and the last NaN.

#include <algorithm>
#include <cstring>
#include <vector>

#include "max_pool_winner.h"
#include "threads.h"

namespace fastcnn::cpu {

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

  // Pool windows that reach into the padding again, over their places inside the image: padding never wins, not even
  // over -infinity.
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
  int64_t outside_;  // the columns from here on, counted from the padding's first, are outside the image
  int64_t stride_;   // at most outside_: a larger stride leaves a single window
  int64_t count_;
  int64_t phase_;
  int64_t kept_;
  int64_t done_ = 0;
  std::vector<float> dealt_;
  std::vector<float> best_;
  std::vector<int32_t> code_;
};

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

}  // namespace fastcnn::cpu
