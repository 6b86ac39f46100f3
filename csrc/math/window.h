#pragma once
// A window that slides over rows and columns, and the one-byte argmax code of its winner.

#include <cstdint>

#include "host_device.h"

namespace fastcnn {

// The code of a pooled value is its winner's place in the window, row-major, 0 to 253; 255 says that ReLU is off here,
// or that the window covers no pixel: no gradient flows.
constexpr int64_t MAX_WINDOW_PLACES = 254;
constexpr int32_t RELU_OFF = 255;

// One axis of a window, in pixels.
struct Axis {
  int64_t size;
  int64_t stride;
  int64_t padding;
  int64_t dilation;
};

struct Window {
  Axis rows;
  Axis columns;
  bool ceil_mode;
};

// The rows and columns of one image before and after a pool.
struct Plane {
  int64_t height;
  int64_t width;
  int64_t out_height;
  int64_t out_width;
};

FASTCNN_HOST_DEVICE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

FASTCNN_HOST_DEVICE int64_t clamp(int64_t value, int64_t low, int64_t high) {
  return value < low ? low : (value > high ? high : value);
}

// How many pixels a window covers, gaps included.
FASTCNN_HOST_DEVICE int64_t span(const Axis& axis) { return axis.dilation * (axis.size - 1) + 1; }

// How many windows there are, by torch's rule: under ceil_mode a last, partial window counts only if it starts inside
// the input or its left padding.
FASTCNN_HOST_DEVICE int64_t output_size(const Axis& axis, int64_t length, bool ceil_mode) {
  const int64_t rest = length + 2 * axis.padding - span(axis) + (ceil_mode ? axis.stride - 1 : 0);
  const int64_t count = rest / axis.stride + 1;
  return count - (ceil_mode && (count - 1) * axis.stride >= length + axis.padding ? 1 : 0);
}

// The pixel of a window's first place; negative in the padding.
FASTCNN_HOST_DEVICE int64_t first_pixel(const Axis& axis, int64_t window) {
  return window * axis.stride - axis.padding;
}

// The places [first_place, end_place) of a window are inside the image; there may be none.
FASTCNN_HOST_DEVICE int64_t first_place(const Axis& axis, int64_t window) {
  const int64_t start = first_pixel(axis, window);
  return start < 0 ? clamp(ceil_div(-start, axis.dilation), 0, axis.size) : 0;
}

FASTCNN_HOST_DEVICE int64_t end_place(const Axis& axis, int64_t window, int64_t length) {
  const int64_t rest = length - first_pixel(axis, window);
  return rest <= 0 ? 0 : clamp(ceil_div(rest, axis.dilation), 0, axis.size);
}

// The windows [first_inside, end_inside) have all their places inside the image.
FASTCNN_HOST_DEVICE int64_t first_inside(const Axis& axis, int64_t windows) {
  return clamp(ceil_div(axis.padding, axis.stride), 0, windows);
}

FASTCNN_HOST_DEVICE int64_t end_inside(const Axis& axis, int64_t windows, int64_t length) {
  const int64_t rest = length - span(axis) + axis.padding;
  return rest < 0 ? 0 : clamp(rest / axis.stride + 1, 0, windows);
}

// The windows that may cover a pixel: from first_window to last_window; place_at tells which of them do.
FASTCNN_HOST_DEVICE int64_t last_window(const Axis& axis, int64_t pixel, int64_t windows) {
  return clamp((pixel + axis.padding) / axis.stride, -1, windows - 1);
}

FASTCNN_HOST_DEVICE int64_t first_window(const Axis& axis, int64_t pixel) {
  const int64_t rest = pixel + axis.padding - (span(axis) - 1);
  return rest <= 0 ? 0 : ceil_div(rest, axis.stride);
}

// The place at which a window covers a pixel, or -1.
FASTCNN_HOST_DEVICE int64_t place_at(const Axis& axis, int64_t window, int64_t pixel) {
  const int64_t distance = pixel - first_pixel(axis, window);
  const bool covers = distance >= 0 && distance < span(axis) && distance % axis.dilation == 0;
  return covers ? distance / axis.dilation : -1;
}

FASTCNN_HOST_DEVICE int32_t code_of(int64_t row, int64_t column, const Axis& columns) {
  return static_cast<int32_t>(row * columns.size + column);
}

FASTCNN_HOST_DEVICE int64_t row_of(int32_t code, const Axis& columns) { return code / columns.size; }

FASTCNN_HOST_DEVICE int64_t column_of(int32_t code, const Axis& columns) { return code % columns.size; }

}  // namespace fastcnn
