#pragma once
// The scan of NCHW planes by windows of 2x2 or 3x3 neighbours that lie two pixels apart: max_pool.cu, bn_relu_pool.cu,
// lrn_pool.cu.
//
// A thread has two neighbouring windows, whose values share an instruction where they have 16 bits, and goes down a
// strip of rows. A row of pixels is judged once, for the windows above and below it; then the rows of a window are.

#include "best.h"
#include "pool_scan.h"
#include "strips.h"

namespace fastcnn::cuda {

constexpr int PAIR = 2;  // windows of a thread

// Whether a window has no place outside the image but in its first or its last row or column.
inline bool nearly_inside(const Axis& axis, int64_t length, int64_t windows) {
  return axis.stride == 2 && axis.padding <= 1 && first_pixel(axis, windows - 1) + axis.size - 1 <= length;
}

// The side of windows that strips serve, or 0.
inline int side_of_strips(const Window& window, const Plane& plane) {
  const bool fits = plane.out_width >= PAIR && plane.height * plane.width < MOST_PLACES &&
                    nearly_inside(window.rows, plane.height, plane.out_height) &&
                    nearly_inside(window.columns, plane.width, plane.out_width);
  return !fits ? 0 : is_square(window, 2) ? 2 : is_square(window, 3) ? 3 : 0;
}

// The first window of a pair; the last pair ends with its row, and may repeat one of the pair before.
__device__ __forceinline__ int first_of_pair(int pair, int windows) {
  return pair * PAIR < windows - PAIR ? pair * PAIR : windows - PAIR;
}

// Two neighbouring windows of an image. A column outside stands for its neighbour inside: it has the same value, and
// only codes tell them apart, where the window begins outside.
template <int SIDE, bool CODES, class T, class Prepare>
class WindowPair {
 public:
  static constexpr int COUNT = PAIR, SPAN = SIDE + 2;  // windows and columns

  __device__ __forceinline__ WindowPair(int left, int width, const Prepare& prepare)
      : prepare_(prepare),
        begins_(left >= 0),
        ends_(left + SPAN <= width),
        exist_(begins_ ? 0xffffffffu : 0xffff0000u) {}

  // The winners of a row of pixels, of which the first window begins at `line`.
  __device__ __forceinline__ Best<T, PAIR> row(const T* line) const {
    T pixels[SPAN];
#pragma unroll
    for (int i = 1; i < SPAN - 1; ++i) {
      pixels[i] = line[i];
    }
    pixels[0] = pixels[1];
    if (begins_) {
      pixels[0] = line[0];
    }
    pixels[SPAN - 1] = pixels[SPAN - 2];
    if (ends_) {
      pixels[SPAN - 1] = line[SPAN - 1];
    }
    Vector<T, PAIR> places[SIDE];
#pragma unroll
    for (int s = 0; s < SIDE; ++s) {
      places[s] = prepare_(Vector<T, PAIR>{pixels[s], pixels[s + 2]});
    }
    return Best<T, PAIR>(places, CODES, exist_);
  }

  // The i-th window's value at a place, which may be outside.
  __device__ __forceinline__ bool value(const T* line, int i, int s, float& value) const {
    const int column = i * 2 + s;
    const bool inside = (column > 0 || begins_) && (column < SPAN - 1 || ends_);
    if (inside) {
      value = static_cast<float>(prepare_(Vector<T, PAIR>{line[column], line[column]}).at[0]);
    }
    return inside;
  }

  template <class Element>
  __device__ __forceinline__ static void store(Element* to, const Vector<Element, PAIR>& elements) {
    store_apart(to, elements);
  }

 private:
  const Prepare& prepare_;
  bool begins_, ends_;  // whether the pair's first and last column are inside
  uint32_t exist_;      // the same of the first, for two elements
};

// Pool `count` rows of windows to y and codes, whose rows are `step` elements apart. The first begins at `line`, the
// row `top` of an image of `height` rows that are `pitch` elements apart.
template <int SIDE, bool CODES, class T, class Windows>
__device__ __forceinline__ void pool_rows(const Windows& windows, const T* line, int pitch, int top, int height, T* y,
    uint8_t* codes, int step, int count, bool relu) {
  constexpr int N = Windows::COUNT;
  // A row outside stands for its neighbour too; where it is the first, its codes are its neighbour's.
  const auto first_row = [&] {
    Best<T, N> row = windows.row(top < 0 ? line + pitch : line);
    row.add_to_codes(top < 0 ? SIDE : 0);
    return row;
  };
  Best<T, N> rows[SIDE];
  if constexpr (SIDE == 3) {
    rows[0] = first_row();
  }
#pragma unroll 1
  for (; count > 0; --count) {
    const T* second = line + pitch;
    const T* third = second + pitch;
    const bool ends = top + SIDE <= height;
    if constexpr (SIDE == 3) {
      rows[1] = windows.row(second);
      rows[2] = windows.row(ends ? third : second);
    } else {
      rows[0] = first_row();
      rows[1] = windows.row(ends ? second : line);
    }
    Best<T, N> best(rows, CODES);
    if (CODES && best.has_nan()) {  // it wins wherever it is: the last one of a window
#pragma unroll 1
      for (int i = 0; i < N; ++i) {
#pragma unroll 1
        for (int place = top < 0 ? SIDE : 0; place < (ends ? SIDE : SIDE - 1) * SIDE; ++place) {
          float value = 0.0f;
          const int r = place / SIDE, s = place - r * SIDE;
          if (windows.value(line + r * pitch, i, s, value) && value != value) {
            best.set_code(i, place);
          }
        }
      }
    }
    if (relu) {
      best.apply_relu();
    }
    Windows::store(y, best.values());
    y += step;
    if constexpr (CODES) {
      Windows::store(codes, best.codes());
      codes += step;
    }
    line = third;
    top += 2;
    rows[0] = rows[SIDE - 1];
  }
}

// Pool two neighbouring columns of windows to y and codes, which begin with the plane: `count` rows from one on, by an
// image whose rows are `pitch` elements apart. prepare: what happens to values before they are compared.
template <int SIDE, bool CODES, class T, class Prepare>
__device__ __forceinline__ void pool_strip(const T* image, int pitch, T* y, uint8_t* codes, const Prepare& prepare,
    bool relu, const Window32& window, const Plane32& plane, int row, int count, int column) {
  const int top = first_pixel(window.rows, row), left = first_pixel(window.columns, column);
  const WindowPair<SIDE, CODES, T, Prepare> pair(left, plane.width, prepare);
  const int to = row * plane.out_width + column;
  pool_rows<SIDE, CODES>(pair, image + (top * pitch + left), pitch, top, plane.height, y + to, codes + (CODES ? to : 0),
      plane.out_width, count, relu);
}

}  // namespace fastcnn::cuda
