// Batch norm + ReLU. The forward is one pass. The backward sums the gradients in one pass, and in training writes the
// input's gradient in a second. The ReLU's mask is computed again from x, rounded as the output was.

#include "bn_relu.h"

#include "../math/batch_norm.h"
#include "../math/select.h"
#include "../ops.h"
#include "sums.h"
#include "threads.h"

namespace fastcnn::cpu {

Numbers::Numbers(const Norm& norm) {
  const int64_t channels = norm.mean.size(0);
  const float *given_mean = data<float>(norm.mean), *variance = data<float>(norm.variance);
  const float *weight = numbers_or_null(norm.weight), *given_bias = numbers_or_null(norm.bias);
  for (int64_t c = 0; c < channels; ++c) {
    mean.push_back(given_mean[c]);
    inverse.push_back(static_cast<float>(1.0 / std::sqrt(static_cast<double>(variance[c]) + norm.eps)));
    scale.push_back(weight ? inverse[c] * weight[c] : inverse[c]);
    bias.push_back(given_bias ? given_bias[c] : 0.0f);
  }
}

namespace {

constexpr int64_t LINES_A_SUM = 64;  // NHWC: pixels that one partial sum covers

template <class T, bool RELU>
FASTCNN_CLONES void normalize_planes(const T* x, T* y, int64_t pixels, int64_t channels, int64_t first,
    const Numbers& numbers, int64_t begin, int64_t end) {
  for (int64_t p = begin; p < end; ++p) {
    const int64_t c = (first + p) % channels;
    const float mean = numbers.mean[c], scale = numbers.scale[c], bias = numbers.bias[c];
    const T* __restrict from = x + p * pixels;
    T* __restrict to = y + p * pixels;
    for (int64_t i = 0; i < pixels; ++i) {
      const float value = normalize(static_cast<float>(from[i]), mean, scale, bias);
      to[i] = static_cast<T>(RELU ? relu(value) : value);
    }
  }
}

template <class T, bool RELU>
FASTCNN_CLONES void normalize_pixels(
    const T* x, T* y, int64_t channels, const Numbers& numbers, int64_t begin, int64_t end) {
  const float* __restrict mean = numbers.mean.data();
  const float* __restrict scale = numbers.scale.data();
  const float* __restrict bias = numbers.bias.data();
  for (int64_t p = begin; p < end; ++p) {
    const T* __restrict from = x + p * channels;
    T* __restrict to = y + p * channels;
    for (int64_t c = 0; c < channels; ++c) {
      const float value = normalize(static_cast<float>(from[c]), mean[c], scale[c], bias[c]);
      to[c] = static_cast<T>(RELU ? relu(value) : value);
    }
  }
}

// The numbers of some neighbouring channels.
struct Channels {
  float mean[LANES] = {}, scale[LANES] = {}, bias[LANES] = {};

  FASTCNN_HOST_DEVICE Channels(const Numbers& numbers, int64_t first, int64_t lanes) {
    for (int64_t lane = 0; lane < lanes; ++lane) {
      mean[lane] = numbers.mean[first + lane];
      scale[lane] = numbers.scale[first + lane];
      bias[lane] = numbers.bias[first + lane];
    }
  }
};

// The largest number that T rounds to zero: half its smallest, as ties go to the even one.
template <class T>
constexpr float LARGEST_ZERO = 0.0f;
template <>
constexpr float LARGEST_ZERO<BFloat16> = 0x1p-134f;
template <>
constexpr float LARGEST_ZERO<Half> = 0x1p-25f;

// The gradient that flows to the normalized value, which ReLU masks where T rounds it to zero or below.
template <class T, bool MASK>
FASTCNN_HOST_DEVICE float flowing(T grad, float x, float mean, float scale, float bias) {
  const float value = static_cast<float>(grad);
  if constexpr (MASK) {
    return normalize(x, mean, scale, bias) <= LARGEST_ZERO<T> ? 0.0f : value;
  }
  return value;
}

// The sums of the planes [begin, end): (planes, 2).
template <class T, bool MASK>
FASTCNN_CLONES void sum_planes(const T* grad, const T* x, float* sums, int64_t pixels, int64_t channels,
    const Numbers& numbers, int64_t begin, int64_t end) {
  for (int64_t p = begin; p < end; ++p) {
    const int64_t c = p % channels;
    const float mean = numbers.mean[c], scale = numbers.scale[c], bias = numbers.bias[c];
    double total = 0.0, total_times = 0.0;
    for (int64_t start = 0; start < pixels; start += SUM_BLOCK) {
      const T* __restrict from = grad + p * pixels + start, * __restrict values = x + p * pixels + start;
      float flows[LANES] = {}, times[LANES] = {};
      by_lanes(std::min(SUM_BLOCK, pixels - start), [&](int64_t i, int64_t lane) {
        const float value = static_cast<float>(values[i]);
        const float flow = flowing<T, MASK>(from[i], value, mean, scale, bias);
        flows[lane] += flow;
        times[lane] += flow * (value - mean);
      });
      total += added(flows);
      total_times += added(times);
    }
    float* to = sums + p / channels * 2 * channels + p % channels;
    to[0] = static_cast<float>(total);
    to[channels] = static_cast<float>(total_times);
  }
}

// The sums of `lanes` neighbouring channels of some NHWC pixels.
template <class T, bool MASK>
FASTCNN_HOST_DEVICE void sum_lanes(const T* __restrict grad, const T* __restrict x, float* total, float* total_times,
    int64_t pixels, int64_t channels, const Channels& of, int64_t lanes) {
  float sums[LANES] = {}, times[LANES] = {};
  for (int64_t p = 0; p < pixels; ++p) {
    for (int64_t lane = 0; lane < lanes; ++lane) {
      const float value = static_cast<float>(x[p * channels + lane]);
      const float flow =
          flowing<T, MASK>(grad[p * channels + lane], value, of.mean[lane], of.scale[lane], of.bias[lane]);
      sums[lane] += flow;
      times[lane] += flow * (value - of.mean[lane]);
    }
  }
  std::copy(sums, sums + lanes, total);
  std::copy(times, times + lanes, total_times);
}

// The sums of the lines [begin, end) of LINES_A_SUM pixels: (lines, 2, C).
template <class T, bool MASK>
FASTCNN_CLONES void sum_lines(const T* grad, const T* x, float* sums, int64_t pixels, int64_t channels,
    const Numbers& numbers, int64_t begin, int64_t end) {
  for (int64_t line = begin; line < end; ++line) {
    const int64_t first = line * LINES_A_SUM * channels, count = std::min(LINES_A_SUM, pixels - line * LINES_A_SUM);
    float* total = sums + line * 2 * channels;
    int64_t c = 0;
    for (; c + LANES <= channels; c += LANES) {
      sum_lanes<T, MASK>(grad + first + c, x + first + c, total + c, total + channels + c, count, channels,
          Channels(numbers, c, LANES), LANES);
    }
    if (c < channels) {
      sum_lanes<T, MASK>(grad + first + c, x + first + c, total + c, total + channels + c, count, channels,
          Channels(numbers, c, channels - c), channels - c);
    }
  }
}

// The part of each channel's gradient that flows through the batch's own mean and variance.
struct Taken {
  bool training;
  std::vector<float> average, slope;

  // None outside training.
  explicit Taken(int64_t channels) : training(false), average(channels), slope(channels) {}

  Taken(const Tensor& grad_weight, const Tensor& grad_bias, const Layout& layout, const Numbers& numbers)
      : training(true), average(layout.channels), slope(layout.channels) {
    const float count = static_cast<float>(layout.images * layout.pixels);
    for (int64_t c = 0; c < layout.channels; ++c) {
      average[c] = data<float>(grad_bias)[c] / count;
      slope[c] = data<float>(grad_weight)[c] / count * numbers.inverse[c];
    }
  }
};

template <class T, bool MASK>
FASTCNN_CLONES void write_planes(const T* grad, const T* x, T* dx, int64_t pixels, int64_t channels,
    const Numbers& numbers, const Taken& taken, int64_t begin, int64_t end) {
  for (int64_t p = begin; p < end; ++p) {
    const int64_t c = p % channels;
    const float mean = numbers.mean[c], scale = numbers.scale[c], bias = numbers.bias[c];
    const float average = taken.average[c], slope = taken.slope[c];
#pragma GCC ivdep  // dx may be grad, element by element
    for (int64_t i = p * pixels; i < (p + 1) * pixels; ++i) {
      const float value = static_cast<float>(x[i]), flow = flowing<T, MASK>(grad[i], value, mean, scale, bias);
      const float rest = taken.training ? flow - average - (value - mean) * slope : flow;  // 0 times infinity is NaN
      dx[i] = static_cast<T>(rest * scale);
    }
  }
}

template <class T, bool MASK>
FASTCNN_CLONES void write_pixels(const T* grad, const T* x, T* dx, int64_t channels, const Numbers& numbers,
    const Taken& taken, int64_t begin, int64_t end) {
  const float* __restrict mean = numbers.mean.data();
  const float* __restrict scale = numbers.scale.data();
  const float* __restrict bias = numbers.bias.data();
  const float* __restrict average = taken.average.data();
  const float* __restrict slope = taken.slope.data();
  for (int64_t p = begin; p < end; ++p) {
#pragma GCC ivdep
    for (int64_t c = 0; c < channels; ++c) {
      const int64_t i = p * channels + c;
      const float value = static_cast<float>(x[i]);
      const float flow = flowing<T, MASK>(grad[i], value, mean[c], scale[c], bias[c]);
      const float rest = taken.training ? flow - average[c] - (value - mean[c]) * slope[c] : flow;
      dx[i] = static_cast<T>(rest * scale[c]);
    }
  }
}

template <class T, bool RELU>
void run_normalize(const T* x, T* y, const Layout& layout, int64_t first, const Numbers& numbers) {
  const int64_t channels = static_cast<int64_t>(numbers.mean.size());
  if (layout.channels_last) {
    parallel(layout.images * layout.pixels, channels,
        [&](int64_t begin, int64_t end) { normalize_pixels<T, RELU>(x, y, channels, numbers, begin, end); });
  } else {
    parallel(layout.images * layout.channels, layout.pixels, [&](int64_t begin, int64_t end) {
      normalize_planes<T, RELU>(x, y, layout.pixels, channels, first, numbers, begin, end);
    });
  }
}

template <class T, bool MASK>
void run_backward(const Tensor& grad, const Tensor& x, Tensor& dx, Tensor& grad_weight, Tensor& grad_bias,
    const Layout& layout, const Numbers& numbers, bool training) {
  const T *from = data<T>(grad), *values = data<T>(x);
  T* to = mutable_data<T>(dx);
  const int64_t channels = layout.channels, pixels = layout.pixels;
  const int64_t places = layout.images * pixels, planes = layout.images * channels;
  const int64_t lines = layout.channels_last ? ceil_div(places, LINES_A_SUM) : layout.images;
  std::vector<float> sums(lines * 2 * channels);
  const auto write = [&](const Taken& taken, int64_t begin, int64_t end) {
    layout.channels_last ? write_pixels<T, MASK>(from, values, to, channels, numbers, taken, begin, end)
                         : write_planes<T, MASK>(from, values, to, pixels, channels, numbers, taken, begin, end);
  };
  // Outside training a gradient needs no sums, and is written while its line or plane is in the cache.
  const Taken nothing(channels);
  if (layout.channels_last) {
    parallel(lines, LINES_A_SUM * channels * 4, [&](int64_t begin, int64_t end) {
      for (int64_t line = begin; line < end; ++line) {
        sum_lines<T, MASK>(from, values, sums.data(), places, channels, numbers, line, line + 1);
        if (!training) {
          write(nothing, line * LINES_A_SUM, std::min((line + 1) * LINES_A_SUM, places));
        }
      }
    });
  } else {
    parallel(planes, pixels * 4, [&](int64_t begin, int64_t end) {
      for (int64_t plane = begin; plane < end; ++plane) {
        sum_planes<T, MASK>(from, values, sums.data(), pixels, channels, numbers, plane, plane + 1);
        if (!training) {
          write(nothing, plane, plane + 1);
        }
      }
    });
  }
  std::vector<double> total(2 * channels);
  for (int64_t line = 0; line < lines; ++line) {
    for (int64_t i = 0; i < 2 * channels; ++i) {
      total[i] += sums[line * 2 * channels + i];
    }
  }
  for (int64_t c = 0; c < channels; ++c) {
    mutable_data<float>(grad_bias)[c] = static_cast<float>(total[c]);
    mutable_data<float>(grad_weight)[c] = static_cast<float>(total[channels + c] * numbers.inverse[c]);
  }
  if (training) {
    const Taken taken(grad_weight, grad_bias, layout, numbers);
    parallel(layout.channels_last ? places : planes, (layout.channels_last ? channels : pixels) * 2,
        [&](int64_t begin, int64_t end) { write(taken, begin, end); });
  }
}

}  // namespace

template <class T>
void normalize_into(const T* x, T* y, const Layout& layout, int64_t first, const Numbers& numbers, bool relu) {
  relu ? run_normalize<T, true>(x, y, layout, first, numbers) : run_normalize<T, false>(x, y, layout, first, numbers);
}

#define FASTCNN_NORMALIZE(T) template void normalize_into(const T*, T*, const Layout&, int64_t, const Numbers&, bool)
FASTCNN_NORMALIZE(float);
FASTCNN_NORMALIZE(BFloat16);
FASTCNN_NORMALIZE(Half);
#undef FASTCNN_NORMALIZE

std::tuple<Tensor, Tensor, Tensor> normalize_backward(
    const Tensor& grad, const Tensor& x, Tensor dx, const Numbers& numbers, bool training, bool masked) {
  const Layout shape = layout(x, is_channels_last(x));
  Tensor grad_weight = new_numbers(x, shape.channels), grad_bias = new_numbers(x, shape.channels);
  with_type("batch_norm", x, [&](auto type) {
    using T = decltype(type);
    masked ? run_backward<T, false>(grad, x, dx, grad_weight, grad_bias, shape, numbers, training)
           : run_backward<T, true>(grad, x, dx, grad_weight, grad_bias, shape, numbers, training);
  });
  return {dx, grad_weight, grad_bias};
}

Tensor bn_relu(const Tensor& input, const Tensor& mean, const Tensor& variance, std::optional<Tensor> weight,
    std::optional<Tensor> bias, double eps) {
  const Numbers numbers(make_norm(input, mean, variance, weight, bias, eps));
  const bool channels_last = is_channels_last(input);
  const Tensor x = dense(input, channels_last);
  Tensor y = new_tensor(x, x.sizes(), x.scalar_type(), channels_last);
  with_type("batch_norm", x, [&](auto type) {
    using T = decltype(type);
    normalize_into(data<T>(x), mutable_data<T>(y), layout(x, channels_last), 0, numbers, true);
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> bn_relu_backward(const Tensor& grad, const Tensor& input, const Tensor& mean,
    const Tensor& variance, std::optional<Tensor> weight, std::optional<Tensor> bias, double eps, bool training) {
  check_same_shape("bn_relu_backward", grad, input);
  const Numbers numbers(make_norm(input, mean, variance, weight, bias, eps));
  const bool channels_last = is_channels_last(input);
  const Tensor x = dense(input, channels_last);
  const Tensor dx = new_tensor(x, x.sizes(), x.scalar_type(), channels_last);
  return normalize_backward(dense(grad, channels_last), x, dx, numbers, training, false);
}

}  // namespace fastcnn::cpu
