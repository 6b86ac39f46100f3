#pragma once
// How threads share a tensor (N, C, places), whose places are pixels, windows or patches of pixels: each keeps its
// channels and walks over places, so that what belongs to a channel stays in registers.
//
// channels_last: `lanes` neighbouring threads hold the channels of one place, N each; `rows` neighbouring places are
// looked at together. The places of all images are one sequence.
// NCHW: `rows` threads look at neighbouring places of one plane; a block has several teams of them if planes are small.
//
// All of it depends on shapes alone, not on the GPU: sums over a walk are the same everywhere.

#include <algorithm>
#include <initializer_list>

#include "../tensors.h"
#include "vector.h"

namespace fastcnn::cuda {

// Divides numbers below 2^52 by a multiplication: a 64-bit division is a subroutine on the GPU, and costs registers.
struct Divisor {
  int64_t value;
  double inverse;

  Divisor() = default;
  Divisor(int64_t divisor) : value(divisor), inverse(1.0 / static_cast<double>(divisor)) {}

  FASTCNN_HOST_DEVICE int64_t quotient(int64_t number) const {
    const auto close = static_cast<int64_t>(static_cast<double>(number) * inverse);  // off by one at most
    const int64_t rest = number - close * value;
    return close + (rest >= value ? 1 : 0) - (rest < 0 ? 1 : 0);
  }
};

struct Walks {
  Divisor channels;
  Divisor parts;   // channels_last: how many blocks share the channels of a place; NCHW: planes
  Divisor image;   // places of one image
  int64_t places;  // channels_last: of all images; NCHW: of one plane
  int64_t shares;  // how many teams share the places
  int64_t share;   // places of one team
  int64_t stride;  // elements from a place to the next
  int lanes;
  int rows;
  int teams;
  int threads;
  bool channels_last;

  int64_t blocks() const { return places == 0 ? 0 : ceil_div(parts.value * shares, teams); }
};

// One thread's.
struct Walk {
  int64_t plane;  // 0 if channels_last
  int64_t share;
  int64_t channel;  // the first of the thread's channels
  int64_t offset;   // from a place's first element to the thread's
  int64_t first;    // the first place; the others follow at a distance of Walks::rows
  int64_t at;       // and its element
  int place;        // the first place in the share, and the share's end
  int end;
  int row;
  bool active;
};

// Enough for every GPU, few enough for their sums to be added up quickly.
constexpr int64_t MOST_BLOCKS = 2048;
constexpr int BLOCK_THREADS = 256;
constexpr int64_t MOST_PLACES = 1 << 30;
constexpr int64_t POOL_DEPTH = 2;  // where a walk starts is found by divisions; from there, without

// Share places so that a thread with many has at least `depth` of them; threads hold `width` channels if channels_last.
inline Walks make_walks(int64_t images, int64_t channels, int64_t places, bool channels_last, int64_t width,
    int64_t stride, int64_t depth) {
  Walks walks{};
  walks.channels = channels;
  walks.image = places;
  walks.stride = stride;
  walks.channels_last = channels_last;
  if (channels_last) {
    const int64_t vectors = channels / width, parts = ceil_div(vectors, BLOCK_THREADS);
    walks.places = images * places;
    walks.parts = parts;
    walks.lanes = static_cast<int>(std::max<int64_t>(ceil_div(vectors, std::max<int64_t>(parts, 1)), 1));
    walks.rows = BLOCK_THREADS / walks.lanes;
    walks.teams = 1;
  } else {
    walks.places = places;
    walks.parts = images * channels;
    walks.lanes = 1;
    walks.rows = static_cast<int>(clamp(places, 1, BLOCK_THREADS));
    walks.teams = BLOCK_THREADS / walks.rows;
  }
  walks.threads = static_cast<int>(round_up(walks.lanes * walks.rows * walks.teams, WARP));
  const int64_t wanted = MOST_BLOCKS * walks.teams / std::max<int64_t>(walks.parts.value, 1);
  walks.shares = clamp(wanted, 1, std::max<int64_t>(ceil_div(walks.places, walks.rows * depth), 1));
  walks.share = round_up(ceil_div(walks.places, walks.shares), walks.rows);
  walks.shares = walks.share == 0 ? 0 : ceil_div(walks.places, walks.share);
  STD_TORCH_CHECK(
      places < MOST_PLACES && walks.share < MOST_PLACES, "fastcnn: an image of ", places, " pixels is too large");
  return walks;
}

// Whether 16-byte accesses may start where these tensors do.
inline bool are_aligned(std::initializer_list<const Tensor*> tensors) {
  return std::all_of(tensors.begin(), tensors.end(),
      [](const Tensor* tensor) { return tensor == nullptr || is_aligned(tensor->const_data_ptr(), 16); });
}

// WIDTH: channels of a thread if channels_last.
template <int WIDTH>
__device__ __forceinline__ Walk start_walk(const Walks& walks) {
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % walks.lanes, team = thread / walks.lanes / walks.rows;
  const int64_t number = static_cast<int64_t>(blockIdx.x) * walks.teams + team;
  Walk walk;
  walk.share = walks.parts.quotient(number);
  const int64_t part = number - walk.share * walks.parts.value;
  walk.row = thread / walks.lanes % walks.rows;
  walk.plane = walks.channels_last ? 0 : part;
  walk.offset = walks.channels_last ? (part * walks.lanes + lane) * WIDTH : 0;
  walk.channel = walks.channels_last ? walk.offset : part - walks.channels.quotient(part) * walks.channels.value;
  walk.active = team < walks.teams && walk.share < walks.shares && walk.channel < walks.channels.value;
  const int64_t begin = walk.share * walks.share, rest = walks.places - begin;
  walk.first = begin + walk.row;
  walk.at = (walk.plane * walks.places + walk.first) * walks.stride + walk.offset;
  walk.place = walk.row;
  walk.end = !walk.active ? 0 : static_cast<int>(rest < walks.share ? rest : walks.share);
  return walk;
}

// A place as a row and a column of an image, or of a plane in NCHW.
struct Position {
  int64_t image;
  int row;
  int column;
};

// Turns a walk's places into positions, without a division for each.
class Route {
 public:
  __device__ __forceinline__ Route(const Walks& walks, const Walk& walk, int height, int width)
      : height_(height), width_(width), rows_(walks.rows / width), columns_(walks.rows % width) {
    const int64_t image = walks.image.quotient(walk.first);
    const int rest = static_cast<int>(walk.first - image * walks.image.value);
    at = {walk.plane + image, rest / width, rest % width};
  }

  __device__ __forceinline__ void advance() {
    at.row += rows_;
    at.column += columns_;
    if (at.column >= width_) {
      at.column -= width_;
      ++at.row;
    }
    while (at.row >= height_) {
      at.row -= height_;
      ++at.image;
    }
  }

  Position at;

 private:
  int height_;
  int width_;
  int rows_;
  int columns_;
};

}  // namespace fastcnn::cuda
