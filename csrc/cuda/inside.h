#pragma once
// The part of a pool's window that lies inside the image.

#include "max_pool.h"
#include "walk.h"

namespace fastcnn::cuda {

// The places of an output's window that are inside the image: rows and columns from begin to end.
struct Inside {
  int top, left;
  int row, end_row;
  int column, end_column;

  __device__ __forceinline__ Inside(const Window32& window, const Plane32& plane, const Position& at)
      : top(first_pixel(window.rows, at.row)),
        left(first_pixel(window.columns, at.column)),
        row(first_place(window.rows, at.row)),
        end_row(end_place(window.rows, at.row, plane.height)),
        column(first_place(window.columns, at.column)),
        end_column(end_place(window.columns, at.column, plane.width)) {}

  __device__ __forceinline__ bool contains(int r, int s) const {
    return r >= row && r < end_row && s >= column && s < end_column;
  }
  // The code to begin with: that of the first place, which wins even if it is minus infinity.
  __device__ __forceinline__ int32_t first_code(const Window32& window) const {
    return row < end_row && column < end_column ? code_of(row, column, window.columns) : RELU_OFF;
  }
};

// The same window, with what is known of it while compiling.
template <int SIDE>
__device__ __forceinline__ Window32 square(const Window32& window) {
  const auto &rows = window.rows, &columns = window.columns;
  return {{SIDE, rows.stride, rows.padding, 1}, {SIDE, columns.stride, columns.padding, 1}, window.ceil_mode};
}

inline bool is_square(const Window& window, int64_t side) {
  return window.rows.size == side && window.columns.size == side && window.rows.dilation == 1 &&
         window.columns.dilation == 1;
}

}  // namespace fastcnn::cuda
