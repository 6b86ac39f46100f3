#pragma once
// The scan over the places of a pool's windows, whatever loads a value: max_pool.cu, bn_relu_pool.cu and lrn_pool.cu.

#include "best.h"
#include "max_pool.h"
#include "vector.h"
#include "walk.h"

namespace fastcnn::cuda {

// The places of an output's window that are inside the image: rows and columns from begin to end.
struct Inside {
  int top, left;
  int row, end_row;
  int column, end_column;

  __device__ __forceinline__ Inside(const Window32& window, const Plane32& plane, int out_row, int out_column)
      : top(first_pixel(window.rows, out_row)),
        left(first_pixel(window.columns, out_column)),
        row(first_place(window.rows, out_row)),
        end_row(end_place(window.rows, out_row, plane.height)),
        column(first_place(window.columns, out_column)),
        end_column(end_place(window.columns, out_column, plane.width)) {}

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

// Which scan serves a window: of the sides 2 and 3, or 0, also where an image has more elements than 32 bits count.
inline int side_of_scan(const Window& window, int64_t image_elements) {
  for (int side : {2, 3}) {
    if (image_elements <= MOST_OFFSETS && is_square(window, side)) {
      return side;
    }
  }
  return 0;
}

// The winners of any window, place after place.
// load: line(row) is where a row of pixels begins, at(line, column) a pixel's vector, prepared(vector) what is
// compared.
template <class T, int N, class Load>
__device__ __forceinline__ Best<T, N> scan_any(
    const Window32& window, const Plane32& plane, int out_row, int out_column, const Load& load) {
  const Inside inside(window, plane, out_row, out_column);
  Best<T, N> best(inside.first_code(window));
#pragma unroll 1
  for (int r = inside.row; r < inside.end_row; ++r) {
    const auto line = load.line(inside.top + r * window.rows.dilation);
#pragma unroll 1
    for (int s = inside.column; s < inside.end_column; ++s) {
      const Vector<T, N> place = load.prepared(load.at(line, inside.left + s * window.columns.dilation));
      best.take(place, code_of(r, s, window.columns));
    }
  }
  return best;
}

// The same of SIDE x SIDE neighbours, at least one of them inside the image: all places are loaded before any is
// judged. One outside stands for its neighbour inside, so nothing must be guarded: it has the same value. Only codes
// tell them apart, where the window begins outside.
template <int SIDE, class T, int N, class Load>
__device__ __forceinline__ Best<T, N> scan_square(
    const Window32& window, const Plane32& plane, int out_row, int out_column, bool codes, const Load& load) {
  const int top = first_pixel(window.rows, out_row), left = first_pixel(window.columns, out_column);
  Vector<T, N> places[SIDE * SIDE];
#pragma unroll
  for (int r = 0; r < SIDE; ++r) {
    const auto line = load.line(into(top + r, plane.height));
#pragma unroll
    for (int s = 0; s < SIDE; ++s) {
      places[r * SIDE + s] = load.at(line, into(left + s, plane.width));
    }
  }
#pragma unroll
  for (Vector<T, N>& place : places) {
    place = load.prepared(place);
  }
  Best<T, N> best(places, codes);
  if (codes && (top < 0 || left < 0 || best.has_nan())) {
    best = scan_any<T, N>(window, plane, out_row, out_column, load);
  }
  return best;
}

// SIDE is 0 for any window.
template <int SIDE, class T, int N, class Load>
__device__ __forceinline__ Best<T, N> scan(
    const Window32& window, const Plane32& plane, int out_row, int out_column, bool codes, const Load& load) {
  if constexpr (SIDE == 0) {
    return scan_any<T, N>(window, plane, out_row, out_column, load);
  } else {
    return scan_square<SIDE, T, N>(square<SIDE>(window), plane, out_row, out_column, codes, load);
  }
}

// Loads from an image in global memory, its values prepared by `prepare`. Offset: what counts an image's elements. In
// 32 bits an address takes one instruction; six if compilers may sort 64-bit sums.
template <class T, int N, class Offset, class Prepare>
struct ImageLoad {
  const T* image;
  const PlaneStrides& strides;
  const Prepare& prepare;

  __device__ __forceinline__ Offset line(int row) const { return static_cast<Offset>(row) * strides.line; }
  __device__ __forceinline__ Vector<T, N> at(Offset line, int column) const {
    return load_packed<N>(image + (line + static_cast<Offset>(column) * strides.pixel));
  }
  __device__ __forceinline__ Vector<T, N> prepared(const Vector<T, N>& loaded) const { return prepare(loaded); }
};

// Pool the places of a thread's walk to y and codes (null if not asked for). prepare: what happens to values before
// they are compared.
template <int SIDE, int N, class T, class Prepare>
__device__ __forceinline__ void pool_walk(const T* x, T* y, uint8_t* codes, const Prepare& prepare, bool relu,
    const Window32& window, const Plane32& plane, const PlaneStrides& strides, const RouteSteps& steps,
    const Walks& walks, const Walk& walk) {
  using Offset = std::conditional_t<SIDE == 0, uint64_t, uint32_t>;
  Route route(walks, walk, steps);
  const T* corner = x + walk.offset;
  T* to = y + walk.at;
  uint8_t* codes_to = codes + walk.at;
  const int64_t step = walks.rows * walks.stride;
  for (int place = walk.place; place < walk.end; place += walks.rows) {
    const ImageLoad<T, N, Offset, Prepare> load{corner + route.at.image * strides.image, strides, prepare};
    Best<T, N> best = scan<SIDE, T, N>(window, plane, route.at.row, route.at.column, codes != nullptr, load);
    if (relu) {
      best.apply_relu();
    }
    store_packed(to, best.values());
    if (codes != nullptr) {
      store_packed(codes_to, best.codes());
    }
    to += step;
    codes_to += step;
    route.advance();
  }
}

}  // namespace fastcnn::cuda
