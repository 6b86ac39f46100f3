// Mean and variance of each channel: one pass over memory, in blocks that fit the L1 cache and are read twice there.

#include "../batch_norm.h"
#include "../math/batch_norm.h"
#include "../ops.h"
#include "sums.h"
#include "threads.h"

namespace fastcnn::cpu {
namespace {

constexpr int64_t BLOCK = 1024;        // NCHW: elements of a plane
constexpr int64_t LINES_A_BLOCK = 64;  // NHWC: pixels

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

// The blocks [begin, end) of LINES_A_BLOCK NHWC pixels: means, then sums of squares, (blocks, 2, C).
template <class T>
FASTCNN_CLONES void pixels_moments(
    const T* x, double* moments, int64_t pixels, int64_t channels, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block) {
    double* __restrict mean = moments + block * 2 * channels;
    double* __restrict squares = mean + channels;
    const int64_t first = block * LINES_A_BLOCK, last = std::min(first + LINES_A_BLOCK, pixels);
    std::fill(mean, squares + channels, 0.0);
    for (int64_t p = first; p < last; ++p) {
      const T* __restrict from = x + p * channels;
      for (int64_t c = 0; c < channels; ++c) {
        mean[c] += static_cast<double>(static_cast<float>(from[c]));
      }
    }
    for (int64_t c = 0; c < channels; ++c) {
      mean[c] /= static_cast<double>(last - first);
    }
    for (int64_t p = first; p < last; ++p) {
      const T* __restrict from = x + p * channels;
      for (int64_t c = 0; c < channels; ++c) {
        const double off = static_cast<double>(static_cast<float>(from[c])) - mean[c];
        squares[c] += off * off;
      }
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
  const int64_t pixels = layout.images * layout.pixels, blocks = ceil_div(pixels, LINES_A_BLOCK);
  std::vector<double> moments(blocks * 2 * channels);
  parallel(blocks, LINES_A_BLOCK * channels * 2,
      [&](int64_t begin, int64_t end) { pixels_moments(x, moments.data(), pixels, channels, begin, end); });
  for (int64_t block = 0; block < blocks; ++block) {
    const double* mean = moments.data() + block * 2 * channels;
    const double count = static_cast<double>(std::min(LINES_A_BLOCK, pixels - block * LINES_A_BLOCK));
    for (int64_t c = 0; c < channels; ++c) {
      total[c].merge({mean[c], mean[channels + c], count});
    }
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
