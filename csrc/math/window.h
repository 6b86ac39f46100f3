#pragma once
// A window that slides over rows and columns, and the one-byte argmax code of its winner.

#include <cstdint>
#include <type_traits>

#include "host_device.h"

namespace fastcnn {

// The code of a pooled value is its winner's place in the window, row-major, 0 to 253; 255 says that ReLU is off here,
// or that the window covers no pixel: no gradient flows.
constexpr int64_t MAX_WINDOW_PLACES = 254;
constexpr int32_t RELU_OFF = 255;

// One axis of a window, in pixels. Kernels that check their sizes first use 32-bit integers.
template <class Int>
struct AxisOf {
  Int size;
  Int stride;
  Int padding;
  Int dilation;
};

template <class Int>
struct WindowOf {
  AxisOf<Int> rows;
  AxisOf<Int> columns;
  bool ceil_mode;
};

// The rows and columns of one image before and after a pool.
template <class Int>
struct PlaneOf {
  Int height;
  Int width;
  Int out_height;
  Int out_width;
};

using Axis = AxisOf<int64_t>;
using Window = WindowOf<int64_t>;
using Plane = PlaneOf<int64_t>;

// A parameter that takes the integer type of the others.
template <class Int>
using Same = std::type_identity_t<Int>;

template <class A, class B>
FASTCNN_HOST_DEVICE std::common_type_t<A, B> ceil_div(A a, B b) {
  return (a + b - 1) / b;
}

template <class A, class B, class C>
FASTCNN_HOST_DEVICE std::common_type_t<A, B, C> clamp(A value, B low, C high) {
  return value < low ? low : (value > high ? high : value);
}

// How many pixels a window covers, gaps included.
template <class Int>
FASTCNN_HOST_DEVICE Int span(const AxisOf<Int>& axis) {
  return axis.dilation * (axis.size - 1) + 1;
}

// How many windows there are, by torch's rule: under ceil_mode a last, partial window counts only if it starts inside
// the input or its left padding.
template <class Int>
FASTCNN_HOST_DEVICE Int output_size(const AxisOf<Int>& axis, Same<Int> length, bool ceil_mode) {
  const Int rest = length + 2 * axis.padding - span(axis) + (ceil_mode ? axis.stride - 1 : 0);
  const Int count = rest / axis.stride + 1;
  return count - (ceil_mode && (count - 1) * axis.stride >= length + axis.padding ? 1 : 0);
}

// The pixel of a window's first place; negative in the padding.
template <class Int>
FASTCNN_HOST_DEVICE Int first_pixel(const AxisOf<Int>& axis, Same<Int> window) {
  return window * axis.stride - axis.padding;
}

// The places [first_place, end_place) of a window are inside the image; there may be none.
template <class Int>
FASTCNN_HOST_DEVICE Int first_place(const AxisOf<Int>& axis, Same<Int> window) {
  const Int start = first_pixel(axis, window);
  return start < 0 ? clamp(ceil_div(-start, axis.dilation), 0, axis.size) : 0;
}

template <class Int>
FASTCNN_HOST_DEVICE Int end_place(const AxisOf<Int>& axis, Same<Int> window, Same<Int> length) {
  const Int rest = length - first_pixel(axis, window);
  return rest <= 0 ? 0 : clamp(ceil_div(rest, axis.dilation), 0, axis.size);
}

// The windows [first_inside, end_inside) have all their places inside the image.
template <class Int>
FASTCNN_HOST_DEVICE Int first_inside(const AxisOf<Int>& axis, Same<Int> windows) {
  return clamp(ceil_div(axis.padding, axis.stride), 0, windows);
}

template <class Int>
FASTCNN_HOST_DEVICE Int end_inside(const AxisOf<Int>& axis, Same<Int> windows, Same<Int> length) {
  const Int rest = length - span(axis) + axis.padding;
  return rest < 0 ? 0 : clamp(rest / axis.stride + 1, 0, windows);
}

// The windows that may cover a pixel: from first_window to last_window; place_at tells which of them do.
template <class Int>
FASTCNN_HOST_DEVICE Int last_window(const AxisOf<Int>& axis, Same<Int> pixel, Same<Int> windows) {
  return clamp((pixel + axis.padding) / axis.stride, -1, windows - 1);
}

template <class Int>
FASTCNN_HOST_DEVICE Int first_window(const AxisOf<Int>& axis, Same<Int> pixel) {
  const Int rest = pixel + axis.padding - (span(axis) - 1);
  return rest <= 0 ? 0 : ceil_div(rest, axis.stride);
}

// The place at which a window covers a pixel, or -1.
template <class Int>
FASTCNN_HOST_DEVICE Int place_at(const AxisOf<Int>& axis, Same<Int> window, Same<Int> pixel) {
  const Int distance = pixel - first_pixel(axis, window);
  const bool covers = distance >= 0 && distance < span(axis) && distance % axis.dilation == 0;
  return covers ? distance / axis.dilation : -1;
}

template <class Int>
FASTCNN_HOST_DEVICE int32_t code_of(Same<Int> row, Same<Int> column, const AxisOf<Int>& columns) {
  return static_cast<int32_t>(row * columns.size + column);
}

template <class Int>
FASTCNN_HOST_DEVICE Int row_of(int32_t code, const AxisOf<Int>& columns) {
  return code / columns.size;
}

template <class Int>
FASTCNN_HOST_DEVICE Int column_of(int32_t code, const AxisOf<Int>& columns) {
  return code % columns.size;
}

}  // namespace fastcnn
