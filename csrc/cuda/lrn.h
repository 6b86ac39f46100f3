#pragma once
// How LRN's kernels share out a tensor, and the arithmetic that its stages have in common.
//
// The usual case, a window of five channels and beta 0.75, is served by runs: one thread has 32 bytes' worth of
// neighbouring channels of one pixel in registers, and the few channels before and after them that its windows reach.
// These come from the first-level cache in channels_last, where the neighbouring thread's loads put them, and from the
// second-level one in NCHW, where another block has them. Anything else is served element by element. Window sums are
// computed anew for each channel: nothing slides that could carry a NaN on.

#include <limits>
#include <type_traits>

#include "../tensors.h"
#include "device.h"
#include "vector.h"
#include "walk.h"

namespace fastcnn::cuda {

enum class Path {
  VECTORS,   // runs of a channels_last tensor, in 16-byte accesses
  PLANES,    // runs of an NCHW tensor; neighbouring threads have neighbouring pixels
  ELEMENTS,  // one element a thread, any layout and window
};

constexpr double SMALL_SCALE = 1e-30;  // scales that may be smaller are not for the hardware's approximations
constexpr int REACH = 2;               // channels of a run's window on either side
constexpr int LRN_THREADS = 128;

// The channels of a run.
template <class T>
constexpr int RUN = 32 / sizeof(T);

template <class To, int N>
struct Values {
  To at[N];
};

// Where a run is: `begin` is the offset of its pixel's channel 0, and `step` leads to the next channel.
struct Run {
  int64_t begin;
  int64_t step;
  int64_t image;
  uint32_t pixel;   // of the image
  int32_t channel;  // its first one
  int32_t channels;
};

// How a tensor is cut into runs: (N, pixels, runs of channels) in channels_last, (N, runs of channels, pixels) in NCHW.
struct Runs {
  Layout layout;
  int32_t count;
  int32_t inner, outer;  // runs of a pixel, and pixels, or the other way round
  SmallDivisor by_inner, by_outer;

  int64_t blocks() const { return ceil_div(count, LRN_THREADS); }
};

template <class T>
Runs make_runs(const Layout& layout) {
  const int64_t across = ceil_div(layout.channels, RUN<T>), count = layout.images * layout.pixels * across;
  STD_TORCH_CHECK(
      count < std::numeric_limits<int32_t>::max() - LRN_THREADS, "lrn: the tensor is larger than a launch can count");
  const int64_t inner = layout.channels_last ? across : layout.pixels;
  const int64_t outer = layout.channels_last ? layout.pixels : across;
  return {layout, static_cast<int32_t>(count), static_cast<int32_t>(inner), static_cast<int32_t>(outer), inner, outer};
}

// The last run ends with the channels: where they are no multiple of its length, it repeats some of the run before.
template <class T>
__device__ __forceinline__ int32_t run_channel(int32_t run, int32_t channels) {
  const int32_t channel = run * RUN<T>, last = channels - RUN<T>;
  return channel < last ? channel : last;
}

template <Path PATH, class T>
__device__ __forceinline__ Run run_at(const Runs& runs, int32_t i) {
  const int64_t channels = runs.layout.channels, pixels = runs.layout.pixels;
  const int32_t line = runs.by_inner.quotient(i), place = i - line * runs.inner;
  const int32_t image = runs.by_outer.quotient(line), row = line - image * runs.outer;
  const auto length = static_cast<int32_t>(channels);
  if constexpr (PATH == Path::VECTORS) {
    return {line * channels, 1, image, static_cast<uint32_t>(row), run_channel<T>(place, length), length};
  } else {
    return {image * channels * pixels + place, pixels, image, static_cast<uint32_t>(place), run_channel<T>(row, length),
        length};
  }
}

// Whether the i-th channel of a run that is HALO channels longer on either side exists.
template <class T, int HALO>
__device__ __forceinline__ bool exists(const Run& run, int i) {
  const int32_t channel = run.channel - HALO + i;
  return (i >= HALO || channel >= 0) && (i < HALO + RUN<T> || channel < run.channels);
}

template <int N, class To, class T>
__device__ __forceinline__ void read(const T* from, To* to) {
  const Vector<T, N> packed = *reinterpret_cast<const Vector<T, N>*>(from);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    to[i] = static_cast<To>(packed.at[i]);
  }
}

// A run and HALO channels on either side, zeros where there is no channel. T is the type that gives the run its length.
template <Path PATH, class T, int HALO, class To = float, class From>
__device__ __forceinline__ Values<To, RUN<T> + 2 * HALO> load_run(const From* tensor, const Run& run) {
  constexpr int LENGTH = RUN<T> + 2 * HALO;
  Values<To, LENGTH> values = {};
  if constexpr (PATH == Path::VECTORS) {
    const From* from = tensor + run.begin + run.channel;
#pragma unroll
    for (int i = 0; i < RUN<T>; i += WIDTH<T>) {
      read<WIDTH<T>>(from + i, values.at + HALO + i);
    }
    if (exists<T, HALO>(run, 0)) {
      read<HALO>(from - HALO, values.at);
    }
    if (exists<T, HALO>(run, LENGTH - 1)) {
      read<HALO>(from + RUN<T>, values.at + HALO + RUN<T>);
    }
  } else {
    const From* from = tensor + run.begin + (run.channel - HALO) * run.step;
    const auto bytes = static_cast<uint32_t>(run.step * static_cast<int64_t>(sizeof(From)));
#pragma unroll
    for (int i = 0; i < LENGTH; ++i) {
      if (exists<T, HALO>(run, i)) {
        values.at[i] = static_cast<To>(*advanced(from, bytes, static_cast<uint32_t>(i)));
      }
    }
  }
  return values;
}

// SHARED: whether the tensor is in shared memory, of which compilers must know.
template <Path PATH, bool SHARED = false, class T>
__device__ __forceinline__ void store_run(T* tensor, const Run& run, const Values<float, RUN<T>>& values) {
  T* to = tensor + run.begin + run.channel * run.step;
  if constexpr (PATH == Path::VECTORS) {
#pragma unroll
    for (int i = 0; i < RUN<T>; i += WIDTH<T>) {
      Floats<WIDTH<T>> part;
#pragma unroll
      for (int j = 0; j < WIDTH<T>; ++j) {
        part.at[j] = values.at[i + j];
      }
      store(to + i, part);
    }
  } else {
    const auto bytes = static_cast<uint32_t>(run.step * static_cast<int64_t>(sizeof(T)));
#pragma unroll
    for (int i = 0; i < RUN<T>; ++i) {
      *(SHARED ? to + i * run.step : advanced(to, bytes, static_cast<uint32_t>(i))) = static_cast<T>(values.at[i]);
    }
  }
}

// The sums of five neighbours: two neighbouring windows share the four in their middle, and these are two pairs that
// other windows share. Which of two a window is depends on its channel's number being even: runs begin with an even
// one.
template <int N>
__device__ __forceinline__ Values<float, N - 2 * REACH> window_sums(const Values<float, N>& values) {
  static_assert(REACH == 2 && N % 2 == 0);
  Values<float, N - 2 * REACH> sums;
#pragma unroll
  for (int i = 0; i < N - 2 * REACH; i += 2) {
    const float middle = (values.at[i + 1] + values.at[i + 2]) + (values.at[i + 3] + values.at[i + 4]);
    sums.at[i] = middle + values.at[i];
    sums.at[i + 1] = middle + values.at[i + 5];
  }
  return sums;
}

// The same of squares. Those of 16-bit values are exact, so that nothing is rounded twice if they are added at once.
template <class T, int N>
__device__ __forceinline__ Values<float, N - 2 * REACH> sums_of_squares(const Values<float, N>& x) {
  if constexpr (std::is_same_v<T, float>) {
    Values<float, N> squares;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      squares.at[i] = product(x.at[i], x.at[i]);
    }
    return window_sums(squares);
  } else {
    Values<float, N - 2 * REACH> sums;
    Values<float, N> pairs;  // of the channels i and i + 1, where i is odd
#pragma unroll
    for (int i = 1; i < N - 2; i += 2) {
      pairs.at[i] = multiply_add(x.at[i], x.at[i], product(x.at[i + 1], x.at[i + 1]));
    }
#pragma unroll
    for (int i = 0; i < N - 2 * REACH; i += 2) {
      const float middle = pairs.at[i + 1] + pairs.at[i + 3];
      sums.at[i] = multiply_add(x.at[i], x.at[i], middle);
      sums.at[i + 1] = multiply_add(x.at[i + 5], x.at[i + 5], middle);
    }
    return sums;
  }
}

template <class T, int N>
__device__ __forceinline__ Values<float, N - 2 * REACH> scales(const LRN& norm, const Values<float, N>& x) {
  Values<float, N - 2 * REACH> result = sums_of_squares<T>(x);
#pragma unroll
  for (int i = 0; i < N - 2 * REACH; ++i) {
    result.at[i] = lrn_scale(norm, result.at[i]);
  }
  return result;
}

// 1 / sqrt(value), to two units in the last place; no value below 1e-38 is told from zero.
__device__ __forceinline__ float inverse_root(float value) {
#ifdef __CUDACC__
  float root;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(root) : "f"(value));
  return root;
#else
  return 1.0f / sqrtf(value);
#endif
}

// sqrt(value), to one unit in the last place; no value below 1e-38 is told from zero.
__device__ __forceinline__ float approximate_root(float value) {
#ifdef __CUDACC__
  float root;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(root) : "f"(value));
  return root;
#else
  return sqrtf(value);
#endif
}

// scale ** -0.75 for values that are T in memory: 16 bits round to far less than the roots are off by.
template <class T>
__device__ __forceinline__ float usual_factor(float scale) {
  const float root = inverse_root(scale), root_of_root = approximate_root(root);
  if constexpr (std::is_same_v<T, float>) {
    return refined(scale, root, root_of_root).factor;
  } else {
    return root * root_of_root;
  }
}

// What a channel's gradient becomes by its own factor, and what it hands on to the windows that hold it.
struct Flow {
  float own;
  float through;  // grad * x * scale ** -1.75
};

template <class T>
__device__ __forceinline__ Flow usual_flow(float scale, float grad, float x) {
  const float root = inverse_root(scale), root_of_root = approximate_root(root);
  if constexpr (std::is_same_v<T, float>) {
    const Factors factors = refined(scale, root, root_of_root);
    return {product(grad, factors.factor), product(grad * x, factors.next)};
  } else {
    const float own = product(grad, root * root_of_root);
    return {own, product(own, x * (root * root))};
  }
}

template <Path PATH, class T>
__device__ __forceinline__ Values<float, RUN<T>> normalize_run(const T* x, const Run& run, const LRN& norm) {
  const auto values = load_run<PATH, T, REACH>(x, run);
  Values<float, RUN<T>> result = scales<T>(norm, values);
#pragma unroll
  for (int i = 0; i < RUN<T>; ++i) {
    result.at[i] = values.at[i + REACH] * usual_factor<T>(result.at[i]);
  }
  return result;
}

// An element's window of channels: from `first` of them before it to `end` after it, those that exist.
struct Reach {
  int64_t first;
  int64_t end;
};

__device__ __forceinline__ Reach reach(int64_t before, int64_t size, int64_t channel, int64_t channels) {
  return {-(before < channel ? before : channel), clamp(size - before, 0, channels - channel)};
}

// Factors of an element, given where it is in the tensor.
template <class T>
__device__ __forceinline__ Factors factors_at(
    const T* x, int64_t channel, int64_t channels, int64_t step, const LRN& norm) {
  const Reach window = reach(norm.size / 2, norm.size, channel, channels);
  float sum = 0.0f;
  for (int64_t i = window.first; i < window.end; ++i) {
    const auto value = static_cast<float>(x[i * step]);
    sum = multiply_add(value, value, sum);
  }
  const float scale = lrn_scale(norm, sum);
  switch (power_of(norm.beta)) {
    case Power::THREE_QUARTERS:
      return lrn_factors<Power::THREE_QUARTERS>(norm, scale);
    case Power::ZERO:
      return lrn_factors<Power::ZERO>(norm, scale);
    default:
      return lrn_factors<Power::ANY>(norm, scale);
  }
}

// What the i-th element of a dense tensor is. All indices are at least zero: divided without a sign they cost less.
struct Element {
  int64_t image;
  uint32_t pixel;
  int64_t channel;
};

__device__ __forceinline__ Element element_at(const Layout& layout, int64_t i) {
  const auto channels = static_cast<uint64_t>(layout.channels), pixels = static_cast<uint64_t>(layout.pixels);
  const uint64_t inner = layout.channels_last ? channels : pixels, outer = layout.channels_last ? pixels : channels;
  const uint64_t line = static_cast<uint64_t>(i) / inner, image = line / outer;
  const uint64_t place = static_cast<uint64_t>(i) - line * inner, row = line - image * outer;
  return {static_cast<int64_t>(image), static_cast<uint32_t>(layout.channels_last ? row : place),
      static_cast<int64_t>(layout.channels_last ? place : row)};
}

// The distance from a channel to the next.
__device__ __forceinline__ int64_t step_of(const Layout& layout) { return layout.channels_last ? 1 : layout.pixels; }

// Which path serves tensors of this layout; those given are read and written at the channels of a run.
template <class T, class... Tensors>
Path path_of(const Layout& layout, int64_t size, double beta, double k, const Tensors&... tensors) {
  const bool usual = size == 2 * REACH + 1 && power_of(beta) == Power::THREE_QUARTERS && k > SMALL_SCALE;
  if (!usual || layout.channels < RUN<T> || layout.channels % 2 != 0) {
    return Path::ELEMENTS;
  }
  if (!layout.channels_last) {
    return layout.pixels < MOST_PLACES ? Path::PLANES : Path::ELEMENTS;  // 32 bits count the bytes of a plane
  }
  const bool aligned = layout.channels % WIDTH<T> == 0 && (is_aligned(tensors.const_data_ptr(), 16) && ...);
  return aligned ? Path::VECTORS : Path::ELEMENTS;
}

}  // namespace fastcnn::cuda
