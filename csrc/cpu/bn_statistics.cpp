// Mean and variance of each channel: one pass over memory, in blocks that fit the L1 cache and are read twice there.

#include <type_traits>

#include "../batch_norm.h"
#include "../math/batch_norm.h"
#include "../ops.h"
#include "sums.h"
#include "threads.h"

namespace fastcnn::cpu {
namespace {

constexpr int64_t BLOCK = 1024;       // NCHW: elements of a plane
constexpr int64_t BLOCK_NHWC = 4096;  // values, FEWEST_PIXELS to SUM_BLOCK of each channel
constexpr int64_t FEWEST_PIXELS = 64;

// What a block tells of its channels, in float32, (blocks, 3, C): about their means, and the sums and the squares of
// the distances from it. Blocks divide runs of pixels: the planes of an image, or all pixels of NHWC.
struct Blocks {
  int64_t runs, pixels, size, channels;
  std::vector<float> sums;

  Blocks(int64_t runs, int64_t pixels, int64_t size, int64_t channels)
      : runs(runs), pixels(pixels), size(size), channels(channels), sums(runs * of_run() * 3 * channels) {}

  int64_t of_run() const { return ceil_div(pixels, size); }
  int64_t count(int64_t block) const { return std::min(size, pixels - block * size); }
};

// The planes [begin, end) of an NCHW tensor.
template <class T>
FASTCNN_CLONES void planes_sums(const T* x, Blocks& blocks, int64_t begin, int64_t end) {
  using Wide = std::conditional_t<std::is_same_v<T, float>, double, float>;  // a mean of float32 is exact in stock
  const int64_t channels = blocks.channels, of_run = blocks.of_run();
  for (int64_t p = begin; p < end; ++p) {
    float* to = blocks.sums.data() + p / channels * of_run * 3 * channels + p % channels;
    for (int64_t block = 0; block < of_run; ++block, to += 3 * channels) {
      const int64_t count = blocks.count(block);
      const T* __restrict from = x + p * blocks.pixels + block * blocks.size;
      const auto value = [&](int64_t i) { return static_cast<float>(from[i]); };
      const Wide mean = sum_of<Wide>(count, value) / static_cast<Wide>(count);
      const float about = static_cast<float>(mean);
      const auto distance = [&](int64_t i) { return value(i) - about; };
      to[0] = about;
      to[channels] = static_cast<float>((mean - about) * static_cast<Wide>(count));
      to[2 * channels] = sum_of<float>(count, [&](int64_t i) { return distance(i) * distance(i); });
    }
  }
}

// The sums of some NHWC pixels of so few channels that theirs stay in registers.
template <class T>
FASTCNN_HOST_DEVICE void add_lanes(const T* __restrict x, float* sums, int64_t pixels, int64_t channels) {
  float lanes[LANES] = {};
  for (int64_t p = 0; p < pixels; ++p) {
    for (int64_t lane = 0; lane < channels; ++lane) {
      lanes[lane] += static_cast<float>(x[p * channels + lane]);
    }
  }
  std::copy(lanes, lanes + channels, sums);
}

// `lanes` neighbouring channels of some NHWC pixels: `sums` holds their means and gets the other numbers of Blocks.
template <class T>
FASTCNN_HOST_DEVICE void lanes_sums(
    const T* __restrict x, float* sums, int64_t pixels, int64_t channels, int64_t lanes) {
  float about[LANES] = {}, rest[LANES] = {}, squares[LANES] = {};
  std::copy(sums, sums + lanes, about);
  for (int64_t p = 0; p < pixels; ++p) {
    for (int64_t lane = 0; lane < lanes; ++lane) {
      const float distance = static_cast<float>(x[p * channels + lane]) - about[lane];
      rest[lane] += distance;
      squares[lane] += distance * distance;
    }
  }
  std::copy(rest, rest + lanes, sums + channels);
  std::copy(squares, squares + lanes, sums + 2 * channels);
}

// The blocks [begin, end) of an NHWC tensor: read from memory pixel by pixel, then from the cache.
template <class T>
FASTCNN_CLONES void pixels_sums(const T* x, Blocks& blocks, int64_t begin, int64_t end) {
  const int64_t channels = blocks.channels;
  for (int64_t block = begin; block < end; ++block) {
    float* __restrict to = blocks.sums.data() + block * 3 * channels;
    const T* __restrict from = x + block * blocks.size * channels;
    const int64_t count = blocks.count(block);
    if (channels == LANES) {
      add_lanes(from, to, count, LANES);
    } else if (channels < LANES) {
      add_lanes(from, to, count, channels);
    } else {
      for (int64_t p = 0; p < count; ++p) {
        for (int64_t c = 0; c < channels; ++c) {
          to[c] += static_cast<float>(from[p * channels + c]);
        }
      }
    }
    for (int64_t c = 0; c < channels; ++c) {
      to[c] /= static_cast<float>(count);
    }
    int64_t c = 0;
    for (; c + LANES <= channels; c += LANES) {
      lanes_sums(from + c, to + c, count, channels, LANES);
    }
    if (c < channels) {
      lanes_sums(from + c, to + c, count, channels, channels - c);
    }
  }
}

// The means of the channels, and the sums of the squares of the distances from them.
FASTCNN_CLONES void merge(const Blocks& blocks, double* means, double* squares) {
  const int64_t channels = blocks.channels, of_run = blocks.of_run();
  const float* about = blocks.sums.data();
  double before = 0.0;
  for (int64_t block = 0; block < blocks.runs * of_run; ++block, about += 3 * channels) {
    const float *rest = about + channels, *off = rest + channels;
    const double count = static_cast<double>(blocks.count(block % of_run));
    const double one = 1.0 / count, share = count / (before + count);
#pragma GCC ivdep
    for (int64_t c = 0; c < channels; ++c) {
      const double near = about[c], missed = rest[c] * one;
      const double mean = near - near == 0.0 ? near + missed : near;  // infinity stays
      Moments<double> all{means[c], squares[c], before};
      all.merge({mean, std::max(off[c] - rest[c] * missed, 0.0), count}, share);
      means[c] = all.mean;
      squares[c] = all.squares;
    }
    before += count;
  }
}

template <class T>
Blocks channels_sums(const T* x, const Layout& layout) {
  const int64_t channels = layout.channels, pixels = layout.images * layout.pixels;
  if (!layout.channels_last) {
    Blocks blocks(layout.images, layout.pixels, BLOCK, channels);
    parallel(layout.images * channels, layout.pixels * 2,
        [&](int64_t begin, int64_t end) { planes_sums(x, blocks, begin, end); });
    return blocks;
  }
  Blocks blocks(1, pixels, std::clamp(BLOCK_NHWC / std::max<int64_t>(channels, 1), FEWEST_PIXELS, SUM_BLOCK), channels);
  parallel(blocks.of_run(), blocks.size * channels * 2,
      [&](int64_t begin, int64_t end) { pixels_sums(x, blocks, begin, end); });
  return blocks;
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
    std::vector<double> means(channels), squares(channels);
    merge(channels_sums(from, shape), means.data(), squares.data());
    const double count = static_cast<double>(shape.images * shape.pixels);
    for (int64_t c = 0; c < channels; ++c) {
      to[c] = static_cast<float>(means[c]);
      to[channels + c] = static_cast<float>(squares[c] / count);
      to[2 * channels + c] = static_cast<float>(squares[c] / (count - 1.0));
    }
  });
  return statistics;
}

}  // namespace fastcnn::cpu
