// Convolution + bias + ReLU, with a 2x2 max-pool if asked, in one kernel on tensor cores.

#include <algorithm>

#include "convolution.h"
#include "epilogue.cuh"
#include "launch.h"

namespace fastcnn::cuda {
namespace {

template <class T, class TILE, int CHUNK>
__global__ void __launch_bounds__(TILE::THREADS, TILE::BLOCKS) implicit_gemm_kernel(const Gemm<T> gemm, int steps) {
  unsigned char* shared = shared_memory();
  const Corner<T> corner(gemm, TILE::M, TILE::N);
  OperandLoader<T, TILE, CHUNK> operands(gemm, corner);
  Accumulators<T, TILE> product;
  int filled = 0;  // the stage to copy to next
  for (; filled < TILE::STAGES - 1; ++filled) {
    if (filled < steps) {
      operands.copy(shared + filled * TILE::STAGE_BYTES);
    }
    commit_copies();
  }
  int ready = 0;  // the stage to multiply next
  for (int step = 0; step < steps; ++step) {
    wait_for_copies<TILE::STAGES - 2>();
    __syncthreads();  // this stage is complete, and nobody reads the one before it any more
    if (step + TILE::STAGES - 1 < steps) {
      operands.copy(shared + filled * TILE::STAGE_BYTES);
    }
    commit_copies();
    product.add(shared + ready * TILE::STAGE_BYTES);
    filled = filled + 1 == TILE::STAGES ? 0 : filled + 1;
    ready = ready + 1 == TILE::STAGES ? 0 : ready + 1;
  }
  finish(gemm, corner, product);
}

// Warps that compute 64x64 read shared memory least; smaller tiles serve few pixels.
using LARGE = GemmTile<128, 128, 2, 2, 3, 2>;
using TALL = GemmTile<256, 64, 4, 1, 3, 2>;
using NARROW = GemmTile<128, 64, 2, 2, 4, 3>;
using SMALL = GemmTile<64, 64, 2, 2, 4, 4>;

Steps steps(const Axis& axis) {
  return {static_cast<int>(axis.size), static_cast<int>(axis.stride), static_cast<int>(axis.padding),
      static_cast<int>(axis.dilation)};
}

template <class T, class TILE, int CHUNK>
void launch(const Device& device, Gemm<T>& gemm) {
  const int64_t rows = gemm.pooled ? gemm.places * 4 : gemm.places;
  gemm.tiles_n = static_cast<int>(ceil_div(gemm.group_out, TILE::N));
  const int64_t depth = static_cast<int64_t>(gemm.rows.size) * gemm.columns.size * gemm.group_in;
  const int64_t deep = ceil_div(depth, TILE::ROW_BYTES / static_cast<int64_t>(sizeof(T)));
  device.launch(implicit_gemm_kernel<T, TILE, CHUNK>, ceil_div(rows, TILE::M) * gemm.groups * gemm.tiles_n,
      TILE::THREADS, TILE::SHARED_BYTES, gemm, static_cast<int>(deep));
}

// Whether there are two tiles for each multiprocessor, with no more idle channels than the smallest tiles have.
template <class TILE, class T>
bool suits(const Gemm<T>& gemm) {
  const int64_t rows = gemm.pooled ? gemm.places * 4 : gemm.places;
  const int64_t tiles = ceil_div(rows, TILE::M) * gemm.groups * ceil_div(gemm.group_out, TILE::N);
  return tiles >= 2 * multiprocessors() && round_up(gemm.group_out, TILE::N) == round_up(gemm.group_out, SMALL::N);
}

template <class T>
void choose_tile(const Device& device, Gemm<T>& gemm) {
  const bool whole_chunks = gemm.group_in % WIDTH<T> == 0 && is_aligned(gemm.input, 16) && is_aligned(gemm.weight, 16);
  if (!whole_chunks) {
    launch<T, SMALL, 1>(device, gemm);
  } else if (suits<LARGE>(gemm)) {
    launch<T, LARGE, WIDTH<T>>(device, gemm);
  } else if (suits<TALL>(gemm)) {
    launch<T, TALL, WIDTH<T>>(device, gemm);
  } else if (suits<NARROW>(gemm)) {
    launch<T, NARROW, WIDTH<T>>(device, gemm);
  } else {
    launch<T, SMALL, WIDTH<T>>(device, gemm);
  }
}

// Neighbouring places of the window lie in the same cache lines if they are read one after the other: a line of
// channels at a time, where channels come in whole lines.
template <class T>
int slice(int64_t channels) {
  constexpr int64_t LINE = 128 / sizeof(T);
  return static_cast<int>(channels % LINE == 0 ? LINE : channels);
}

template <class T>
void run(const Convolution& convolution, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
    const Plane& places, Tensor& y, Tensor& codes, Fused fused, bool channels_last) {
  const int64_t channels = weight.size(0), group_out = channels / convolution.groups;
  Gemm<T> gemm{};
  gemm.input = data<T>(x);
  gemm.weight = data<T>(weight);
  gemm.bias = bias ? data<T>(*bias) : nullptr;
  gemm.output = mutable_data<T>(y);
  gemm.codes = fused == Fused::RELU_POOL_CODES ? mutable_data<uint8_t>(codes) : nullptr;
  gemm.height = static_cast<int>(x.size(2));
  gemm.width = static_cast<int>(x.size(3));
  gemm.channels = static_cast<int>(x.size(1));
  gemm.rows = steps(convolution.window.rows);
  gemm.columns = steps(convolution.window.columns);
  gemm.groups = static_cast<int>(convolution.groups);
  gemm.group_in = static_cast<int>(weight.size(1));
  gemm.group_out = static_cast<int>(group_out);
  gemm.slice = slice<T>(weight.size(1));
  gemm.row_places = static_cast<int>(places.out_width);
  gemm.image_places = static_cast<int>(places.out_height * places.out_width);
  gemm.places = x.size(0) * places.out_height * places.out_width;
  gemm.pooled = fused != Fused::RELU;
  gemm.channels_last = channels_last;
  gemm.wide_stores =
      channels_last && group_out % WIDTH<T> == 0 && is_aligned(gemm.output, 16) && is_aligned(gemm.codes, WIDTH<T>);
  choose_tile(Device(x), gemm);
}

// Whether the offsets that the kernel keeps in 32 bits fit: those in the weight, and those in a tile's images, padding
// included.
bool fits(const Convolution& convolution, const Plane& places, int64_t rows_a_place) {
  constexpr int64_t MOST = 1 << 30;
  const Tensor& input = convolution.input;
  const Window& window = convolution.window;
  const int64_t channels = input.size(1), height = input.size(2), width = input.size(3);
  const int64_t padded = (height + 2 * window.rows.padding) * (width + 2 * window.columns.padding) * channels;
  const int64_t images = TALL::M / (places.out_height * places.out_width * rows_a_place) + 2;
  const int64_t covered = std::min(images, input.size(0)) * channels * height * width;
  return convolution.weight.numel() < MOST && padded + covered < MOST;
}

void check(const Convolution& convolution) {
  const Tensor &input = convolution.input, &weight = convolution.weight;
  const auto& bias = convolution.bias;
  STD_TORCH_CHECK(input.dim() == 4 && weight.dim() == 4 && input.scalar_type() == weight.scalar_type() &&
                      input.size(1) == weight.size(1) * convolution.groups && weight.size(0) % convolution.groups == 0,
      "implicit_gemm: input and weight do not fit each other");
  STD_TORCH_CHECK(!bias || (bias->numel() == weight.size(0) && bias->scalar_type() == weight.scalar_type()),
      "implicit_gemm: weight and bias do not fit each other");
}

}  // namespace

std::pair<Tensor, Tensor> implicit_gemm(const Convolution& convolution, Fused fused) {
  check(convolution);
  const Tensor& input = convolution.input;
  const int64_t side = fused == Fused::RELU ? 1 : 2;
  Plane plane = make_plane(convolution.window, input.size(2), input.size(3));
  plane.out_height /= side;
  plane.out_width /= side;
  const bool channels_last = gives_channels_last(convolution);
  const std::vector<int64_t> shape{input.size(0), convolution.weight.size(0), plane.out_height, plane.out_width};
  const std::vector<int64_t> none{0};
  Tensor y = new_tensor(input, shape, input.scalar_type(), channels_last);
  const bool wants_codes = fused == Fused::RELU_POOL_CODES;
  const auto byte = torch::headeronly::ScalarType::Byte;
  Tensor codes = wants_codes ? new_tensor(input, shape, byte, channels_last) : new_tensor(input, none, byte, false);
  if (y.numel() > 0) {
    STD_TORCH_CHECK(fits(convolution, plane, side * side),
        "implicit_gemm: expected images and a weight of fewer than 2**30 elements");
    const Tensor x = dense(input, true), weight = dense(convolution.weight, true);
    const auto bias = convolution.bias ? std::optional(dense(*convolution.bias, false)) : std::nullopt;
    with_type("implicit_gemm", x,
        [&](auto type) { run<decltype(type)>(convolution, x, weight, bias, plane, y, codes, fused, channels_last); });
  }
  return {y, codes};
}

}  // namespace fastcnn::cuda
