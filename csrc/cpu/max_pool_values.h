#pragma once
// Max-pool of NCHW planes without codes, for windows of two or three neighbours along each axis: a plane is one long
// vector. Each place takes the largest of the columns that begin there; each output row the largest of its input rows,
// at every column; last, the columns at which windows begin are picked.

#include <algorithm>
#include <vector>

#include "max_pool_winner.h"
#include "threads.h"

namespace fastcnn::cpu {

// Whether ValuePlane serves a window.
inline bool is_small(const Window& window) {
  const auto fits = [](const Axis& axis) { return axis.dilation == 1 && (axis.size == 2 || axis.size == 3); };
  return fits(window.rows) && fits(window.columns);
}

template <class T, bool RELU>
class ValuePlane {
 public:
  ValuePlane(const Window& window, const Plane& plane)
      : window_(window),
        plane_(plane),
        begin_(first_inside(window.columns, plane.out_width)),
        end_(std::max(begin_, end_inside(window.columns, plane.out_width, plane.width))),
        along_(plane.height * plane.width + LANES, LOWEST),
        best_(round_up(plane.width, LANES), LOWEST) {}

  FASTCNN_HOST_DEVICE void pool(const T* x, T* y) {
    window_.columns.size == 2 ? reduce_columns<2>(x) : reduce_columns<3>(x);
    for (int64_t o = 0; o < plane_.out_height; ++o) {
      T* output = y + o * plane_.out_width;
      reduce_rows(o);
      pick(output);
      for (int64_t i = 0; i < begin_; ++i) {
        output[i] = at_border(x, o, i);
      }
      for (int64_t i = end_; i < plane_.out_width; ++i) {
        output[i] = at_border(x, o, i);
      }
    }
  }

 private:
  // No window inside the image reads the places where one row runs on into the next.
  template <int SIZE>
  FASTCNN_HOST_DEVICE void reduce_columns(const T* __restrict x) {
    float* __restrict along = along_.data();
    const int64_t count = plane_.height * plane_.width - (SIZE - 1);
    for (int64_t i = 0; i < count; ++i) {
      float best = static_cast<float>(x[i]);
#pragma GCC unroll 2
      for (int s = 1; s < SIZE; ++s) {
        const float value = static_cast<float>(x[i + s]);
        best = wins(value, best) ? value : best;
      }
      along[i] = best;
    }
  }

  // The best of an output row's input rows; one that stands twice does not change its own winner.
  FASTCNN_HOST_DEVICE void reduce_rows(int64_t o) {
    const Axis& rows = window_.rows;
    const int64_t first = first_pixel(rows, o) + first_place(rows, o);
    const int64_t last = first_pixel(rows, o) + end_place(rows, o, plane_.height) - 1;
    float* __restrict best = best_.data();
    if (last < first) {
      std::fill(best_.begin(), best_.end(), LOWEST);
      return;
    }
    const float* __restrict a = along_.data() + first * plane_.width;
    const float* __restrict b = along_.data() + (first + last) / 2 * plane_.width;
    const float* __restrict c = along_.data() + last * plane_.width;
    const int64_t count = round_up(best_.size(), LANES);  // whole vectors: a row's end goes on into the next
    for (int64_t i = 0; i < count; ++i) {
      float value = a[i];
      value = wins(b[i], value) ? b[i] : value;
      value = wins(c[i], value) ? c[i] : value;
      best[i] = value;
    }
  }

  FASTCNN_HOST_DEVICE void pick(T* __restrict output) const {
    const int64_t stride = window_.columns.stride, count = end_ - begin_;
    const float* __restrict from = best_.data() + begin_ * stride - window_.columns.padding;
    T* __restrict to = output + begin_;
    if (stride == 1) {
      for (int64_t i = 0; i < count; ++i) {
        to[i] = result(from[i]);
      }
    } else if (stride == 2) {
      for (int64_t i = 0; i < count; ++i) {
        to[i] = result(from[2 * i]);
      }
    } else {
      for (int64_t i = 0; i < count; ++i) {
        to[i] = result(from[i * stride]);
      }
    }
  }

  // A window that reaches into the padding: padding never wins.
  T at_border(const T* x, int64_t o, int64_t i) const {
    const Axis &rows = window_.rows, &columns = window_.columns;
    const int64_t top = first_pixel(rows, o), left = first_pixel(columns, i);
    float best = LOWEST;
    for (int64_t r = first_place(rows, o); r < end_place(rows, o, plane_.height); ++r) {
      for (int64_t s = first_place(columns, i); s < end_place(columns, i, plane_.width); ++s) {
        const float value = static_cast<float>(x[(top + r) * plane_.width + left + s]);
        best = wins(value, best) ? value : best;
      }
    }
    return result(best);
  }

  FASTCNN_HOST_DEVICE static T result(float best) { return static_cast<T>(RELU ? relu(best) : best); }

  const Window& window_;
  const Plane& plane_;
  int64_t begin_;  // the windows [begin_, end_) have all their columns inside
  int64_t end_;
  std::vector<float> along_;
  std::vector<float> best_;
};

}  // namespace fastcnn::cpu
