// Local response normalization across channels, forward and backward, in one pass over memory.
//
// A block of pixels of one image is brought to float32: NCHW as lines of pixels, one a channel; NHWC as lines of
// channels, one a pixel. Zeros stand before and after the channels, so that a window needs no border. Windows are
// summed anew for each channel: a sliding sum would carry a NaN or a rounding error on to later channels.
//
// The usual backward, of NCHW in float32 and windows of five, needs no scratch memory.

#include "lrn.h"

#include "../math/power.h"
#include "../ops.h"
#include "threads.h"

#include <cstring>
#include <type_traits>

namespace fastcnn::cpu {
namespace {

constexpr int64_t BLOCK_FLOATS = 32 * 1024;  // of one scratch array: a few of them stay in the second-level cache
constexpr int64_t LONGEST_LINE =
    4096;                             // pixels of a plane that are read where they are: a window's lines stay there too
constexpr int64_t FEWEST_BLOCKS = 8;  // of a tensor, for the threads

// The blocks of a tensor. In scratch memory a block has channels of zeros before and after the image's.
struct Blocks {
  Layout layout;
  int64_t padding;   // channels of zeros on each side
  int64_t pixels;    // of a block; the last one of an image may have fewer
  int64_t an_image;  // blocks

  Blocks(const Layout& layout, const LRN& norm, bool copied)
      : layout(layout),
        padding(norm.size / 2),
        pixels(clamp(wanted(copied) / 16 * 16, 16, round_up(layout.pixels, 16))),
        an_image(ceil_div(layout.pixels, pixels)) {}

  int64_t wanted(bool copied) const {
    return copied ? BLOCK_FLOATS / rows() : std::min(LONGEST_LINE, layout.images * layout.pixels / FEWEST_BLOCKS);
  }

  int64_t count() const { return layout.images * an_image; }
  int64_t rows() const { return layout.channels + 2 * padding; }
  int64_t size() const { return rows() * pixels; }
  int64_t cost() const { return pixels * layout.channels * 4; }
  // Where the i-th block begins in the tensor, and how many pixels it has.
  int64_t begin(int64_t i) const {
    const int64_t pixel = i % an_image * pixels;
    return i / an_image * layout.channels * layout.pixels + pixel * (layout.channels_last ? layout.channels : 1);
  }
  int64_t length(int64_t i) const { return std::min(pixels, layout.pixels - i % an_image * pixels); }

  // A line is what is contiguous: NCHW: a block's pixels in one channel; NHWC: the channels of one pixel.
  int64_t lines(int64_t length) const { return layout.channels_last ? length : layout.channels; }
  int64_t line_length(int64_t length) const { return layout.channels_last ? layout.channels : length; }
  int64_t line_begin(int64_t line) const { return line * (layout.channels_last ? layout.channels : layout.pixels); }
  // Where a line begins in scratch memory, and how far the next channel is there.
  int64_t scratch_begin(int64_t line) const {
    return layout.channels_last ? line * rows() + padding : (line + padding) * pixels;
  }
  int64_t step() const { return layout.channels_last ? 1 : pixels; }
};

template <class T>
FASTCNN_HOST_DEVICE void load(const Blocks& blocks, int64_t length, const T* __restrict x, float* __restrict scratch) {
  const int64_t count = blocks.line_length(length);
  for (int64_t line = 0; line < blocks.lines(length); ++line) {
    const T* __restrict from = x + blocks.line_begin(line);
    float* __restrict to = scratch + blocks.scratch_begin(line);
    for (int64_t i = 0; i < count; ++i) {
      to[i] = static_cast<float>(from[i]);
    }
  }
}

struct Square {
  FASTCNN_HOST_DEVICE float operator()(float value) const { return value * value; }
};

struct Same {
  FASTCNN_HOST_DEVICE float operator()(float value) const { return value; }
};

// The channels of a line's window: `size` of them, `step` apart.
struct Neighbours {
  const float* first;
  int64_t size;
  int64_t step;
};

// The sum of term(value) over a window of five, as a function of the place in the line: the loop that uses the sum
// computes it, so that the additions run while quotients and roots are under way.
template <class Term>
struct FiveSummed {
  const float* __restrict first;
  int64_t step;
  FASTCNN_HOST_DEVICE float operator()(int64_t i) const {
    constexpr Term term;
    return term(first[i]) + term(first[i + step]) + term(first[i + 2 * step]) + term(first[i + 3 * step]) +
           term(first[i + 4 * step]);
  }
};

// A sum that was computed before.
struct Summed {
  const float* __restrict total;
  FASTCNN_HOST_DEVICE float operator()(int64_t i) const { return total[i]; }
};

// Call use with the sums of a line's windows; `scratch` has room for a line.
template <class Term, class Use>
FASTCNN_HOST_DEVICE void with_sums(const Neighbours& near, int64_t count, float* __restrict scratch, const Use& use) {
  constexpr Term term;
  if (near.size == 5) {
    return use(FiveSummed<Term>{near.first, near.step});
  }
  for (int64_t i = 0; i < count; ++i) {
    scratch[i] = term(near.first[i]);
  }
  for (int64_t j = 1; j < near.size; ++j) {
    const float* __restrict other = near.first + j * near.step;
    for (int64_t i = 0; i < count; ++i) {
      scratch[i] += term(other[i]);
    }
  }
  use(Summed{scratch});
}

// The channels of a line's window: in scratch memory, or, if x needs no conversion (scratch is null), in the tensor
// itself, where there is no padding.
FASTCNN_HOST_DEVICE Neighbours neighbours(
    const Blocks& blocks, const LRN& norm, const float* x, const float* scratch, int64_t line) {
  const int64_t before = norm.size / 2, after = (norm.size - 1) / 2;
  if (scratch) {
    return {scratch + blocks.scratch_begin(line) - before * blocks.step(), norm.size, blocks.step()};
  }
  const int64_t begin = std::max<int64_t>(line - before, 0), end = std::min(line + after + 1, blocks.layout.channels);
  return {x + blocks.line_begin(begin), end - begin, blocks.layout.pixels};
}

template <class T>
bool needs_copy(const Layout& layout) {
  return layout.channels_last || !std::is_same_v<T, float>;
}

// y = x * factor, for one line.
template <class T, Power POWER, class Sum>
FASTCNN_HOST_DEVICE void normalize(
    const float* __restrict x, const Sum& sum, int64_t count, const LRN& norm, T* __restrict y) {
  const bool multiplied = POWER == Power::THREE_QUARTERS && may_multiply(norm);
  if (multiplied) {
    int32_t largest = 0;
    for (int64_t i = 0; i < count; ++i) {
      const float scale = lrn_scale(norm, sum(i));
      largest = std::max(largest, bits_of(scale));
      y[i] = static_cast<T>(x[i] * multiplied_factor(scale));
    }
    if (largest < INFINITE) {
      return;
    }
  }
  for (int64_t i = 0; i < count; ++i) {
    const float scale = lrn_scale(norm, sum(i));
    if (!multiplied || bits_of(scale) >= INFINITE) {  // the line's others keep the bits that they have elsewhere
      y[i] = static_cast<T>(x[i] * lrn_factors<POWER>(norm, scale).factor);
    }
  }
}

// Prefetch the next line of a tensor: processors do not foresee steps of a whole plane.
template <class T>
FASTCNN_HOST_DEVICE void prefetch(const T* line, int64_t count) {
  constexpr int64_t CACHE_LINE = 64 / sizeof(T);
  for (int64_t i = 0; i < count; i += CACHE_LINE) {
    __builtin_prefetch(line + i);
  }
}

template <class T, Power POWER>
FASTCNN_CLONES void forward(const T* x, T* y, const Blocks& blocks, const LRN& norm, int64_t begin, int64_t end) {
  const bool copy = needs_copy<T>(blocks.layout);
  std::vector<float> values(copy ? blocks.size() : 0), total(std::max(blocks.pixels, blocks.layout.channels));
  for (int64_t block = begin; block < end; ++block) {
    const int64_t length = blocks.length(block), count = blocks.line_length(length);
    const float* direct = reinterpret_cast<const float*>(x + blocks.begin(block));
    if (copy) {
      load(blocks, length, x + blocks.begin(block), values.data());
    }
    for (int64_t line = 0; line < blocks.lines(length); ++line) {
      const Neighbours near = neighbours(blocks, norm, direct, copy ? values.data() : nullptr, line);
      const float* __restrict own =
          copy ? values.data() + blocks.scratch_begin(line) : direct + blocks.line_begin(line);
      if (!copy) {
        prefetch(near.first + near.size * near.step, count);
      }
      T* __restrict to = y + blocks.begin(block) + blocks.line_begin(line);
      with_sums<Square>(near, count, total.data(),
          [&](const auto& sum) __attribute__((always_inline)) { normalize<T, POWER>(own, sum, count, norm, to); });
    }
  }
}

// For one line: the factors, and the terms of the sums that dx needs.
template <class T, Power POWER, class Sum>
FASTCNN_HOST_DEVICE void take_terms(const Sum& sum, const float* __restrict own, const T* __restrict grad,
    int64_t count, const LRN& norm, float* __restrict factor, float* __restrict term) {
  for (int64_t i = 0; i < count; ++i) {
    const Factors powers = lrn_factors<POWER>(norm, lrn_scale(norm, sum(i)));
    factor[i] = powers.factor;
    term[i] = static_cast<float>(grad[i]) * own[i] * powers.next;
  }
}

// For one line: dx, from the sums of terms over the windows that hold it.
template <class T, class Sum>
FASTCNN_HOST_DEVICE void give_gradient(const Sum& sum, const float* __restrict own, const T* __restrict grad,
    const float* __restrict factor, int64_t count, const LRN& norm, T* __restrict dx) {
  for (int64_t i = 0; i < count; ++i) {
    dx[i] = static_cast<T>(lrn_gradient(norm, static_cast<float>(grad[i]), own[i], factor[i], sum(i)));
  }
}

template <class T, Power POWER>
FASTCNN_CLONES void backward(
    const T* x, const T* grad, T* dx, const Blocks& blocks, const LRN& norm, int64_t begin, int64_t end) {
  std::vector<float> values(blocks.size()), factors(blocks.size()), terms(blocks.size());
  std::vector<float> scratch(std::max(blocks.pixels, blocks.layout.channels));
  const int64_t step = blocks.step(), after = (norm.size - 1) / 2 * step;
  for (int64_t block = begin; block < end; ++block) {
    const int64_t length = blocks.length(block), count = blocks.line_length(length), start = blocks.begin(block);
    load(blocks, length, x + start, values.data());
    for (int64_t line = 0; line < blocks.lines(length); ++line) {
      const int64_t at = blocks.scratch_begin(line);
      const Neighbours near = neighbours(blocks, norm, nullptr, values.data(), line);
      with_sums<Square>(near, count, scratch.data(), [&](const auto& sum) __attribute__((always_inline)) {
        take_terms<T, POWER>(sum, values.data() + at, grad + start + blocks.line_begin(line), count, norm,
            factors.data() + at, terms.data() + at);
      });
    }
    for (int64_t line = 0; line < blocks.lines(length); ++line) {
      const int64_t at = blocks.scratch_begin(line), from = start + blocks.line_begin(line);
      const Neighbours near{terms.data() + at - after, norm.size, step};
      with_sums<Same>(near, count, scratch.data(), [&](const auto& sum) __attribute__((always_inline)) {
        give_gradient(sum, values.data() + at, grad + from, factors.data() + at, count, norm, dx + from);
      });
    }
  }
}

// NCHW in float32 by windows of five: a few pixels of a plane, walked through the channels with the windows in
// registers.
constexpr int64_t LANES = 8;
using Lanes = float __attribute__((vector_size(LANES * sizeof(float))));
constexpr int64_t AHEAD = 4 * LANES;  // pixels from the place that is read to the one that is fetched

FASTCNN_HOST_DEVICE void load(const float* from, Lanes& to) { std::memcpy(&to, from, sizeof(Lanes)); }

// Store the lanes from `first` on.
FASTCNN_HOST_DEVICE void store(const Lanes& from, int64_t first, float* to) {
  if (first == 0) {
    std::memcpy(to, &from, sizeof(Lanes));
    return;
  }
  for (int64_t i = first; i < LANES; ++i) {
    to[i] = from[i];
  }
}

// Shift a window by a channel; its last place becomes zero.
template <int64_t COUNT>
FASTCNN_HOST_DEVICE void move_on(Lanes (&window)[COUNT]) {
  for (int64_t i = 0; i + 1 < COUNT; ++i) {
    window[i] = window[i + 1];
  }
  window[COUNT - 1] = Lanes{};
}

// An image has `columns` columns of LANES pixels. The last one begins early enough to be whole, and writes only the
// pixels that it does not share with the column before, which may be another thread's.
template <Power POWER>
FASTCNN_CLONES void backward_columns(const float* x, const float* grad, float* dx, const Layout& layout, LRN norm,
    int64_t columns, int64_t begin, int64_t end) {
  const int64_t channels = layout.channels, plane = layout.pixels;
  for (int64_t column = begin; column < end; ++column) {
    const int64_t own_pixel = column % columns * LANES, pixel = std::min(own_pixel, plane - LANES);
    const int64_t start = column / columns * channels * plane + pixel;
    // Five channels, the last of them `ahead`: the terms are computed for the third, `own`; the gradient is ready for
    // the first, `ready`.
    Lanes values[5] = {}, terms[5] = {}, scaled[3] = {};
    for (int64_t ahead = 0; ahead < channels + 4; ++ahead) {
      const int64_t own = ahead - 2, ready = ahead - 4;
      move_on(values);
      move_on(terms);
      move_on(scaled);
      if (ahead < channels) {
        load(x + start + ahead * plane, values[4]);
        __builtin_prefetch(x + start + ahead * plane + AHEAD);
      }
      if (own >= 0 && own < channels) {
        Lanes gradient, factor, next, sum = values[0] * values[0];
        load(grad + start + own * plane, gradient);
        __builtin_prefetch(grad + start + own * plane + AHEAD);
        for (int64_t i = 1; i < 5; ++i) {
          sum += values[i] * values[i];
        }
        for (int64_t i = 0; i < LANES; ++i) {
          const Factors powers = lrn_factors<POWER>(norm, lrn_scale(norm, sum[i]));
          factor[i] = powers.factor;
          next[i] = powers.next;
        }
        scaled[2] = gradient * factor;
        terms[4] = gradient * values[2] * next;
      }
      if (ready >= 0) {
        const Lanes through = terms[0] + terms[1] + terms[2] + terms[3] + terms[4];
        Lanes result;
        for (int64_t i = 0; i < LANES; ++i) {
          result[i] = lrn_gradient(norm, scaled[0][i], values[0][i], 1.0f, through[i]);
        }
        store(result, own_pixel - pixel, dx + start + ready * plane);
      }
    }
  }
}

// Call run with the formula that serves beta, as a type.
template <class Run>
void with_formula(double beta, const Run& run) {
  switch (power_of(beta)) {
    case Power::THREE_QUARTERS:
      return run(std::integral_constant<Power, Power::THREE_QUARTERS>{});
    case Power::ZERO:
      return run(std::integral_constant<Power, Power::ZERO>{});
    case Power::ANY:
      return run(std::integral_constant<Power, Power::ANY>{});
  }
}

}  // namespace

template <class T>
void lrn_into(const T* x, T* y, const Layout& layout, const LRN& norm) {
  const Blocks blocks(layout, norm, needs_copy<T>(layout));
  with_formula(norm.beta, [&](auto power) {
    parallel(blocks.count(), blocks.cost(),
        [&](int64_t begin, int64_t end) { forward<T, power()>(x, y, blocks, norm, begin, end); });
  });
}

template <class T>
void lrn_backward_into(const T* x, const T* grad, T* dx, const Layout& layout, const LRN& norm) {
  if constexpr (std::is_same_v<T, float>) {
    if (!layout.channels_last && norm.size == 5 && layout.pixels >= LANES) {
      const int64_t columns = ceil_div(layout.pixels, LANES);
      return with_formula(norm.beta, [&](auto power) {
        parallel(layout.images * columns, 12 * LANES * layout.channels, [&](int64_t begin, int64_t end) {
          backward_columns<power()>(x, grad, dx, layout, norm, columns, begin, end);
        });
      });
    }
  }
  const Blocks blocks(layout, norm, true);
  with_formula(norm.beta, [&](auto power) {
    parallel(blocks.count(), 3 * blocks.cost(),
        [&](int64_t begin, int64_t end) { backward<T, power()>(x, grad, dx, blocks, norm, begin, end); });
  });
}

#define FASTCNN_LRN(T)                                             \
  template void lrn_into(const T*, T*, const Layout&, const LRN&); \
  template void lrn_backward_into(const T*, const T*, T*, const Layout&, const LRN&)
FASTCNN_LRN(float);
FASTCNN_LRN(BFloat16);
FASTCNN_LRN(Half);
#undef FASTCNN_LRN

Tensor lrn(const Tensor& input, int64_t size, double alpha, double beta, double k) {
  STD_TORCH_CHECK(input.dim() >= 3, "lrn: expected (N, C, *), got ", input.dim(), " axes");
  STD_TORCH_CHECK(size > 0, "lrn: expected a positive size, got ", size);
  const bool channels_last = is_channels_last(input);
  const Tensor x = dense(input, channels_last);
  Tensor y = new_tensor(x, x.sizes(), x.scalar_type(), channels_last);
  if (y.numel() == 0) {
    return y;
  }
  with_type("lrn", x, [&](auto type) {
    using T = decltype(type);
    lrn_into(data<T>(x), mutable_data<T>(y), layout(x, channels_last), make_norm(size, alpha, beta, k, input.size(1)));
  });
  return y;
}

Tensor lrn_backward(const Tensor& grad, const Tensor& input, int64_t size, double alpha, double beta, double k) {
  STD_TORCH_CHECK(input.dim() >= 3 && grad.dim() == input.dim() && grad.numel() == input.numel(),
      "lrn_backward: expected a gradient of the input's shape, (N, C, *)");
  STD_TORCH_CHECK(grad.scalar_type() == input.scalar_type(), "lrn_backward: gradient and input differ in dtype");
  STD_TORCH_CHECK(size > 0, "lrn_backward: expected a positive size, got ", size);
  const bool channels_last = is_channels_last(input);
  const Tensor x = dense(input, channels_last), from = dense(grad, channels_last);
  Tensor dx = new_tensor(x, x.sizes(), x.scalar_type(), channels_last);
  if (dx.numel() == 0) {
    return dx;
  }
  with_type("lrn_backward", x, [&](auto type) {
    using T = decltype(type);
    const LRN norm = make_norm(size, alpha, beta, k, input.size(1));
    lrn_backward_into(data<T>(x), data<T>(from), mutable_data<T>(dx), layout(x, channels_last), norm);
  });
  return dx;
}

}  // namespace fastcnn::cpu
