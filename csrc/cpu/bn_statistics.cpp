// Mean and variance of each channel: one pass over memory, in blocks that fit the L1 cache and are read twice there.

#include "../batch_norm.h"
#include "../math/batch_norm.h"
#include "../ops.h"
#include "sums.h"
#include "threads.h"

namespace fastcnn::cpu {
namespace {

constexpr int64_t BLOCK = 1024;       // NCHW: elements of a plane
constexpr int64_t BLOCK_NHWC = 4096;  // values, at least FEWEST_PIXELS of each channel
constexpr int64_t FEWEST_PIXELS = 64;
constexpr int64_t LANES = 16;  // NHWC: channels whose sums stay in registers

using Partial = Moments<double>;

// The planes [begin, end) of an NCHW tensor.
template <class T>
FASTCNN_CLONES void planes_moments(const T* x, Partial* moments, int64_t pixels, int64_t begin, int64_t end) {
  float block[BLOCK];
  for (int64_t p = begin; p < end; ++p) {
    Partial all{};
    for (int64_t start = 0; start < pixels; start += BLOCK) {
      const int64_t count = std::min(BLOCK, pixels - start);
      const T* __restrict from = x + p * pixels + start;
      const double mean = wide_sum(from, count) / static_cast<double>(count);
      const float near = static_cast<float>(mean);
      for (int64_t i = 0; i < count; ++i) {
        const float off = static_cast<float>(from[i]) - near;
        block[i] = off * off;
      }
      const double rest = mean - near;
      all.merge({mean, std::max(sum(block, count) - rest * rest * static_cast<double>(count), 0.0),
          static_cast<double>(count)});
    }
    moments[p] = all;
  }
}

// Of `lanes` neighbouring channels of some NHWC pixels: about their means, and the sums and the squares of the
// distances from it, with which merge_blocks corrects them.
template <class T>
FASTCNN_HOST_DEVICE void lanes_sums(
    const T* __restrict x, float* sums, int64_t pixels, int64_t channels, int64_t lanes) {
  float about[LANES] = {}, rest[LANES] = {}, squares[LANES] = {};
  for (int64_t p = 0; p < pixels; ++p) {
    for (int64_t lane = 0; lane < lanes; ++lane) {
      about[lane] += static_cast<float>(x[p * channels + lane]);
    }
  }
  for (float& each : about) {
    each /= static_cast<float>(pixels);
  }
  for (int64_t p = 0; p < pixels; ++p) {
    for (int64_t lane = 0; lane < lanes; ++lane) {
      const float distance = static_cast<float>(x[p * channels + lane]) - about[lane];
      rest[lane] += distance;
      squares[lane] += distance * distance;
    }
  }
  std::copy(about, about + lanes, sums);
  std::copy(rest, rest + lanes, sums + channels);
  std::copy(squares, squares + lanes, sums + 2 * channels);
}

// The blocks [begin, end) of so many NHWC pixels: (blocks, 3, C).
template <class T>
FASTCNN_CLONES void pixels_sums(
    const T* x, float* sums, int64_t pixels, int64_t lines, int64_t channels, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block) {
    float* to = sums + block * 3 * channels;
    const T* from = x + block * lines * channels;
    const int64_t count = std::min(lines, pixels - block * lines);
    int64_t c = 0;
    for (; c + LANES <= channels; c += LANES) {
      lanes_sums(from + c, to + c, count, channels, LANES);
    }
    if (c < channels) {
      lanes_sums(from + c, to + c, count, channels, channels - c);
    }
  }
}

FASTCNN_CLONES void merge_blocks(
    const float* sums, double* means, double* squares, int64_t pixels, int64_t lines, int64_t channels) {
  for (int64_t first = 0; first < pixels; first += lines, sums += 3 * channels) {
    const float *about = sums, *rest = sums + channels, *off = rest + channels;
    const double before = static_cast<double>(first), count = static_cast<double>(std::min(lines, pixels - first));
    const double one = 1.0 / count, share = count / (before + count);
#pragma GCC ivdep
    for (int64_t c = 0; c < channels; ++c) {
      const double near = about[c], missed = rest[c] * one;
      Partial all{means[c], squares[c], before};
      all.merge({near - near == 0.0 ? near + missed : near, off[c] - rest[c] * missed, count}, share);
      means[c] = all.mean;
      squares[c] = all.squares;
    }
  }
}

template <class T>
std::vector<Partial> channels_moments(const T* x, const Layout& layout) {
  const int64_t channels = layout.channels;
  std::vector<Partial> total(channels);
  if (!layout.channels_last) {
    std::vector<Partial> planes(layout.images * channels);
    parallel(layout.images * channels, layout.pixels * 2,
        [&](int64_t begin, int64_t end) { planes_moments(x, planes.data(), layout.pixels, begin, end); });
    for (size_t p = 0; p < planes.size(); ++p) {
      total[p % channels].merge(planes[p]);
    }
    return total;
  }
  const int64_t pixels = layout.images * layout.pixels,
                lines = std::max(BLOCK_NHWC / std::max<int64_t>(channels, 1), FEWEST_PIXELS);
  const int64_t blocks = ceil_div(pixels, lines);
  std::vector<float> sums(blocks * 3 * channels);
  parallel(blocks, lines * channels * 2,
      [&](int64_t begin, int64_t end) { pixels_sums(x, sums.data(), pixels, lines, channels, begin, end); });
  std::vector<double> means(channels), squares(channels);
  merge_blocks(sums.data(), means.data(), squares.data(), pixels, lines, channels);
  for (int64_t c = 0; c < channels; ++c) {
    total[c] = {means[c], squares[c], static_cast<double>(pixels)};
  }
  return total;
}

}  // namespace

Tensor bn_relu_statistics(const Tensor& input) {
  STD_TORCH_CHECK(input.dim() >= 2, "batch_norm: expected (N, C, *), got ", input.dim(), " axes");
  const bool channels_last = is_channels_last(input);
  const Tensor x = dense(input, channels_last);
  const Layout shape = layout(x, channels_last);
  const int64_t channels = shape.channels;
  const std::vector<int64_t> sizes{3, channels};
  Tensor statistics = new_tensor(x, sizes, torch::headeronly::ScalarType::Float, false);
  float* to = mutable_data<float>(statistics);
  with_type("batch_norm", x, [&](auto type) {
    const auto* from = data<decltype(type)>(x);
    const std::vector<Partial> total = channels_moments(from, shape);
    for (int64_t c = 0; c < channels; ++c) {
      to[c] = static_cast<float>(total[c].mean);
      to[channels + c] = static_cast<float>(total[c].squares / total[c].count);
      to[2 * channels + c] = static_cast<float>(total[c].squares / (total[c].count - 1.0));
    }
  });
  return statistics;
}

}  // namespace fastcnn::cpu
