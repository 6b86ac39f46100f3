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

// The means and the sums of squares of `lanes` neighbouring channels of some NHWC pixels.
template <class T>
FASTCNN_HOST_DEVICE void lanes_moments(
    const T* __restrict x, double* mean, double* squares, int64_t pixels, int64_t channels, int64_t lanes) {
  double sums[LANES] = {}, off[LANES] = {};
  for (int64_t p = 0; p < pixels; ++p) {
    for (int64_t lane = 0; lane < lanes; ++lane) {
      sums[lane] += static_cast<double>(static_cast<float>(x[p * channels + lane]));
    }
  }
  for (double& each : sums) {
    each /= static_cast<double>(pixels);
  }
  for (int64_t p = 0; p < pixels; ++p) {
    for (int64_t lane = 0; lane < lanes; ++lane) {
      const double distance = static_cast<double>(static_cast<float>(x[p * channels + lane])) - sums[lane];
      off[lane] += distance * distance;
    }
  }
  std::copy(sums, sums + lanes, mean);
  std::copy(off, off + lanes, squares);
}

// The blocks [begin, end) of so many NHWC pixels: means, then sums of squares, (blocks, 2, C).
template <class T>
FASTCNN_CLONES void pixels_moments(
    const T* x, double* moments, int64_t pixels, int64_t lines, int64_t channels, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block) {
    double* mean = moments + block * 2 * channels;
    const T* from = x + block * lines * channels;
    const int64_t count = std::min(lines, pixels - block * lines);
    int64_t c = 0;
    for (; c + LANES <= channels; c += LANES) {
      lanes_moments(from + c, mean + c, mean + channels + c, count, channels, LANES);
    }
    if (c < channels) {
      lanes_moments(from + c, mean + c, mean + channels + c, count, channels, channels - c);
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
  std::vector<double> moments(blocks * 2 * channels);
  parallel(blocks, lines * channels * 2,
      [&](int64_t begin, int64_t end) { pixels_moments(x, moments.data(), pixels, lines, channels, begin, end); });
  for (int64_t block = 0; block < blocks; ++block) {
    const double* mean = moments.data() + block * 2 * channels;
    const double count = static_cast<double>(std::min(lines, pixels - block * lines));
    const double share = count / (static_cast<double>(block * lines) + count);
    for (int64_t c = 0; c < channels; ++c) {
      total[c].merge({mean[c], mean[channels + c], count}, share);
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
