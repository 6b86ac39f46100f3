// The first layers of networks: a convolution of up to four channels a group with bias and ReLU, and 2x2 max-pool if
// asked. A block keeps the weights of some output channels in shared memory and takes tile after tile of output pixels,
// bringing the patch of the image under each there. It reads input and weight by their strides, whatever their layout.

#include <algorithm>

#include "convolution.h"
#include "direct_output.h"
#include "direct_patch.h"
#include "direct_product.h"
#include "launch.h"

namespace fastcnn::cuda {
namespace {

// How the grid is split: every part of every group's channels by some blocks, which take turns at all the tiles.
struct Work {
  int tiles, tiles_down, tiles_across;
  int blocks;  // of a part
};

// Output channels of a block: the most, and the step in which they go there.
template <class T>
constexpr int MOST_CHANNELS = sizeof(T) == 2 ? 64 : 32;
template <class T>
constexpr int CHANNEL_STEP = sizeof(T) == 2 ? 16 : 8;

// Shared memory in order: weights, biases, offsets, and the patch, whose place the results take.
template <class T>
int64_t shared_bytes(const DirectShape& shape) {
  const int64_t weights = int64_t{shape.channels} * weight_pitch<T>(shape) * sizeof(T);
  const int64_t biases = MOST_CHANNELS<T> * sizeof(float), offsets = shape.padded_taps() * sizeof(int);
  const int64_t patch = int64_t{shape.patch_rows()} * shape.patch_pitch() * sizeof(Pixel<T>);
  const int64_t results = Results<T, MOST_CHANNELS<T>>::SIZE * sizeof(T);
  return weights + biases + offsets + std::max(patch, results);
}

// One block: up to shape.channels output channels of a group, every work.blocks-th tile of TILE_ROWS x TILE_COLUMNS
// pixels of the convolution's output.
template <class T, int CHANNELS>
__global__ void __launch_bounds__(THREADS, 4)
    direct_kernel(DirectShape shape, Work work, const T* input, const T* weight, const T* bias, Output<T> output) {
  const int part = blockIdx.x / work.blocks;
  const int group = part / shape.parts(), first = part % shape.parts() * shape.channels;
  const int count = first + shape.channels < shape.outputs ? shape.channels : shape.outputs - first;
  const int channel = group * shape.outputs + first;

  T* weights = reinterpret_cast<T*>(shared_memory());
  float* biases = reinterpret_cast<float*>(weights + shape.channels * weight_pitch<T>(shape));
  int* offsets = reinterpret_cast<int*>(biases + MOST_CHANNELS<T>);
  auto* patch = reinterpret_cast<Pixel<T>*>(offsets + shape.padded_taps());
  const Results<T, CHANNELS> results{reinterpret_cast<T*>(patch), output.channels_last};

  stage_weights(weights, weight, shape, channel, count);
  stage_offsets(offsets, shape);
  for (int c = threadIdx.x; c < MOST_CHANNELS<T>; c += THREADS) {
    biases[c] = bias && c < count ? static_cast<float>(bias[(channel + c) * shape.bias_stride]) : 0.0f;
  }
  const T* group_input = input + group * shape.inputs * shape.input.channel;
  for (int tile = blockIdx.x % work.blocks; tile < work.tiles; tile += work.blocks) {
    const int line = tile / work.tiles_across, column = tile % work.tiles_across * TILE_COLUMNS;
    const int64_t image = line / work.tiles_down;
    const int row = line % work.tiles_down * TILE_ROWS;
    stage_patch(patch, group_input + image * shape.input.outer, shape,
        row * shape.vertical.stride - shape.vertical.padding,
        column * shape.horizontal.stride - shape.horizontal.padding);
    __syncthreads();
    Sums<T, CHANNELS> sums;
    sums.multiply({patch, offsets, weights}, shape);
    __syncthreads();  // the patch has been read, its place is free
    sums.stage(results, biases, shape);
    __syncthreads();
    const int shrink = shape.pool ? 2 : 1;
    const Origin origin{image, row / shrink, column / shrink, channel, count};
    if (output.vectors) {
      shape.pool ? write_tile<WIDTH<T>, true>(output, results, origin)
                 : write_tile<WIDTH<T>, false>(output, results, origin);
    } else {
      shape.pool ? write_tile<1, true>(output, results, origin) : write_tile<1, false>(output, results, origin);
    }
    __syncthreads();  // the results have been read, their place is free
  }
}

template <class T>
auto kernel_for(int channels) {
  if constexpr (sizeof(T) == 4) {
    return direct_kernel<T, MOST_CHANNELS<T>>;
  } else {
    switch (channels) {
      case 16:
        return direct_kernel<T, 16>;
      case 32:
        return direct_kernel<T, 32>;
      case 48:
        return direct_kernel<T, 48>;
      default:
        return direct_kernel<T, 64>;
    }
  }
}

// How many blocks keep the GPU busy if each needs so much shared memory.
int64_t enough_blocks(int64_t shared_bytes) {
  return multiprocessors() * std::clamp<int64_t>(2 * MOST_SHARED_BYTES / shared_bytes, 1, 4);
}

constexpr int64_t MOST_INDEX = std::numeric_limits<int32_t>::max();

// Inside an image, or an output channel's weights, indices have 32 bits.
Strides strides(const char* argument, const Tensor& tensor) {
  int64_t last = 0;
  for (int axis = 1; axis < 4; ++axis) {
    last += (tensor.size(axis) - 1) * tensor.stride(axis);
  }
  STD_TORCH_CHECK(last <= MOST_INDEX, "backend 'cuda' by 'direct' takes argument '", argument, "' with up to ",
      MOST_INDEX, " elements from the first to the last of one image, got ", last);
  const auto stride = [&](int64_t axis) { return static_cast<int>(std::min(tensor.stride(axis), MOST_INDEX)); };
  return {tensor.stride(0), stride(1), stride(2), stride(3)};
}

Side side(const Axis& axis) {
  constexpr int64_t MOST = 1 << 14;  // more could only be refused for shared memory, after overflowing
  return {static_cast<int>(std::min(axis.size, MOST)), static_cast<int>(std::min(axis.stride, MOST)),
      static_cast<int>(axis.padding), static_cast<int>(std::min(axis.dilation, MOST))};
}

// As many channels a block as fit, in parts of about the same size.
template <class T>
void choose_channels(DirectShape& shape) {
  const auto split = [&](int most) {
    const int parts = (shape.outputs + most - 1) / most;
    return static_cast<int>(round_up((shape.outputs + parts - 1) / parts, CHANNEL_STEP<T>));
  };
  shape.channels = MOST_CHANNELS<T>;
  while (shape.channels > CHANNEL_STEP<T> && shared_bytes<T>(shape) > MOST_SHARED_BYTES) {
    shape.channels -= CHANNEL_STEP<T>;
  }
  shape.channels = split(shape.channels);
  const int64_t bytes = shared_bytes<T>(shape);
  STD_TORCH_CHECK(bytes <= MOST_SHARED_BYTES,
      "backend 'cuda' by 'direct' takes argument 'weight' with a window that, for ", TILE_ROWS, " x ", TILE_COLUMNS,
      " pixels, needs up to ", MOST_SHARED_BYTES, " bytes of shared memory, got ", shape.vertical.size, " x ",
      shape.horizontal.size, " with stride ", shape.vertical.stride, " x ", shape.horizontal.stride, " and dilation ",
      shape.vertical.dilation, " x ", shape.horizontal.dilation, ", which need ", bytes);
}

template <class T>
void run(const Convolution& convolution, DirectShape shape, Output<T> output) {
  choose_channels<T>(shape);
  output.vectors = (output.channels_last ? shape.outputs : output.columns) % WIDTH<T> == 0;
  const Device device(convolution.input);
  const int64_t down = ceil_div(shape.rows, TILE_ROWS), across = ceil_div(shape.columns, TILE_COLUMNS);
  const int64_t tiles = convolution.input.size(0) * down * across;
  STD_TORCH_CHECK(tiles <= std::numeric_limits<int32_t>::max() / 2,
      "backend 'cuda' by 'direct' takes argument 'input' "
      "with up to 2 ** 30 tiles of the output, got ",
      tiles);
  const int64_t bytes = shared_bytes<T>(shape), parts = int64_t{shape.groups} * shape.parts();
  const int64_t blocks = std::clamp<int64_t>(ceil_div(enough_blocks(bytes), parts), 1, tiles);
  const Work work{static_cast<int>(tiles), static_cast<int>(down), static_cast<int>(across), static_cast<int>(blocks)};
  const T* bias = convolution.bias ? data<T>(*convolution.bias) : nullptr;
  device.launch(kernel_for<T>(shape.channels), parts * blocks, THREADS, bytes, shape, work, data<T>(convolution.input),
      data<T>(convolution.weight), bias, output);
}

void check(const Convolution& convolution) {
  const Tensor &input = convolution.input, &weight = convolution.weight;
  STD_TORCH_CHECK(input.dim() == 4 && weight.dim() == 4, "direct: expected input and weight of four axes");
  STD_TORCH_CHECK(weight.size(1) <= MOST_INPUTS, "backend 'cuda' by 'direct' takes argument 'input' with up to ",
      MOST_INPUTS, " channels per group, got ", weight.size(1));
  STD_TORCH_CHECK(input.size(1) == weight.size(1) * convolution.groups && weight.size(0) % convolution.groups == 0,
      "direct: input, weight and groups do not agree");
  STD_TORCH_CHECK(weight.scalar_type() == input.scalar_type(), "direct: input and weight differ in dtype");
  if (convolution.bias) {
    const Tensor& bias = *convolution.bias;
    STD_TORCH_CHECK(bias.dim() == 1 && bias.size(0) == weight.size(0) && bias.scalar_type() == input.scalar_type(),
        "direct: expected a bias (C_out,) of the input's dtype");
  }
  constexpr int64_t MOST_LENGTH = 1 << 30;
  for (const auto& [axis, length] :
      {std::pair(convolution.window.rows, input.size(2)), std::pair(convolution.window.columns, input.size(3))}) {
    STD_TORCH_CHECK(length + 2 * axis.padding < MOST_LENGTH,
        "backend 'cuda' by 'direct' takes argument 'input' with less than ", MOST_LENGTH,
        " rows and columns, padded, got ", length + 2 * axis.padding);
  }
}

DirectShape make_shape(const Convolution& convolution, const Plane& plane, bool pool) {
  STD_TORCH_CHECK(plane.out_height * plane.out_width <= MOST_INDEX,
      "backend 'cuda' by 'direct' takes argument 'input' with up to ", MOST_INDEX,
      " pixels of the output an image, got ", plane.out_height * plane.out_width);
  const auto needed = [&](int64_t length) { return static_cast<int>(pool ? length / 2 * 2 : length); };
  return {
      .inputs = static_cast<int>(convolution.weight.size(1)),
      .outputs = static_cast<int>(convolution.weight.size(0) / convolution.groups),
      .groups = static_cast<int>(convolution.groups),
      .height = static_cast<int>(plane.height),
      .width = static_cast<int>(plane.width),
      .rows = needed(plane.out_height),
      .columns = needed(plane.out_width),
      .vertical = side(convolution.window.rows),
      .horizontal = side(convolution.window.columns),
      .channels = 0,
      .pool = pool,
      .input = strides("input", convolution.input),
      .weight = strides("weight", convolution.weight),
      .bias_stride = convolution.bias ? convolution.bias->stride(0) : 0,
  };
}

}  // namespace

std::pair<Tensor, Tensor> direct(const Convolution& convolution, Fused fused) {
  check(convolution);
  const Tensor &input = convolution.input, &weight = convolution.weight;
  const bool pool = fused != Fused::RELU, channels_last = gives_channels_last(convolution);
  const DirectShape shape = make_shape(convolution, make_plane(convolution.window, input.size(2), input.size(3)), pool);
  const int rows = pool ? shape.rows / 2 : shape.rows, columns = pool ? shape.columns / 2 : shape.columns;
  const std::vector<int64_t> sizes{input.size(0), weight.size(0), rows, columns}, no_sizes{0};
  Tensor values = new_tensor(input, sizes, input.scalar_type(), channels_last);
  const bool wants_codes = fused == Fused::RELU_POOL_CODES;
  Tensor codes = new_tensor(
      input, wants_codes ? sizes : no_sizes, torch::headeronly::ScalarType::Byte, wants_codes && channels_last);
  if (values.numel() > 0) {
    with_type("direct", input, [&](auto type) {
      using T = decltype(type);
      run<T>(convolution, shape,
          {mutable_data<T>(values), wants_codes ? mutable_data<uint8_t>(codes) : nullptr, rows, columns,
              static_cast<int>(weight.size(0)), channels_last, false});
    });
  }
  return {values, codes};
}

}  // namespace fastcnn::cuda
