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

#include "../math/divisor.h"
#include "../tensors.h"
#include "vector.h"

namespace fastcnn::cuda {

struct Walks {
  int64_t channels;
  int64_t parts;  // channels_last: how many blocks share the channels of a place; NCHW: planes
  Divisor image;  // places of one image
  SmallDivisor by_channels, by_parts, by_lanes, by_rows;
  int64_t places;  // channels_last: of all images; NCHW: of one plane
  int64_t shares;  // how many teams share the places
  int64_t share;   // places of one team
  int64_t stride;  // elements from a place to the next
  int lanes;
  int rows;
  int teams;
  int threads;
  bool channels_last;

  int64_t blocks() const { return places == 0 ? 0 : ceil_div(parts * shares, teams); }
};

// One thread's.
struct Walk {
  int64_t plane;  // 0 if channels_last
  int64_t share;
  int channel;     // the first of the thread's channels
  int64_t offset;  // from a place's first element to the thread's
  int64_t first;   // the first place; the others follow at a distance of Walks::rows
  int64_t at;      // and its element
  int place;       // the first place in the share, and the share's end
  int end;
  int row;
  bool active;
};

// Enough that a GPU's last, partial wave of blocks is a small part of all; where blocks leave sums, few enough for
// those to be added up quickly.
constexpr int64_t MOST_BLOCKS = 8192;
constexpr int64_t MOST_SUMS = 4096;
constexpr int BLOCK_THREADS = 256;
constexpr int64_t PLANE_DEPTH = 8;  // places of a thread in NCHW, at least, where a plane has them for a warp
constexpr int64_t MOST_PLACES = 1 << 30;
constexpr int64_t MOST_TEAMS = int64_t{1} << 31;
constexpr int64_t POOL_DEPTH = 2;  // where a walk starts is found by divisions; from there, without

// How many threads look at neighbouring places of a plane: a thread with few places is one that computes where it is,
// but neighbours should read a line of memory together.
inline int plane_rows(int64_t places, bool vectors, int64_t depth) {
  const int64_t deep = round_up(ceil_div(places, depth), vectors ? WARP / 4 : WARP);
  return static_cast<int>(clamp(deep, 1, clamp(places, 1, BLOCK_THREADS)));
}

// Set the divisors, once all else is known.
inline void set_divisors(Walks& walks) {
  walks.by_channels = walks.channels;
  walks.by_parts = walks.parts;
  walks.by_lanes = walks.lanes;
  walks.by_rows = walks.rows;
}

// Share places so that a thread with many has at least `depth` of them, of a plane `plane_depth`; threads hold `width`
// channels if channels_last.
inline Walks make_walks(int64_t images, int64_t channels, int64_t places, bool channels_last, int64_t width,
    int64_t stride, int64_t depth, int64_t most_blocks = MOST_BLOCKS, int64_t plane_depth = PLANE_DEPTH) {
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
    walks.rows = plane_rows(places, stride > 1, plane_depth);
    walks.teams = BLOCK_THREADS / walks.rows;
  }
  walks.threads = static_cast<int>(round_up(walks.lanes * walks.rows * walks.teams, WARP));
  const int64_t wanted = most_blocks * walks.teams / std::max<int64_t>(walks.parts, 1);
  walks.shares = clamp(wanted, 1, std::max<int64_t>(ceil_div(walks.places, walks.rows * depth), 1));
  walks.share = round_up(ceil_div(walks.places, walks.shares), walks.rows);
  walks.shares = walks.share == 0 ? 0 : ceil_div(walks.places, walks.share);
  STD_TORCH_CHECK(
      places < MOST_PLACES && walks.share < MOST_PLACES, "fastcnn: an image of ", places, " pixels is too large");
  STD_TORCH_CHECK(images < MOST_TEAMS && walks.parts * walks.shares < MOST_TEAMS - BLOCK_THREADS, "fastcnn: ", images,
      " images of ", channels, " channels are too many planes");
  set_divisors(walks);
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
  const int thread = static_cast<int>(threadIdx.x), slot = walks.by_lanes.quotient(thread);
  const int lane = thread - slot * walks.lanes, team = walks.by_rows.quotient(slot);
  const int number = static_cast<int>(blockIdx.x) * walks.teams + team, share = walks.by_parts.quotient(number);
  const int part = number - share * static_cast<int>(walks.parts);
  Walk walk;
  walk.share = share;
  walk.row = slot - team * walks.rows;
  walk.plane = walks.channels_last ? 0 : part;
  walk.offset = walks.channels_last ? (part * walks.lanes + lane) * WIDTH : 0;
  walk.channel = walks.channels_last ? static_cast<int>(walk.offset)
                                     : part - walks.by_channels.quotient(part) * static_cast<int>(walks.channels);
  walk.active = team < walks.teams && share < walks.shares && walk.channel < walks.channels;
  const int64_t begin = walk.share * walks.share, rest = walks.places - begin;
  walk.first = begin + walk.row;
  walk.at = (walk.plane * walks.places + walk.first) * walks.stride + walk.offset;
  walk.place = walk.row;
  walk.end = !walk.active ? 0 : static_cast<int>(rest < walks.share ? rest : walks.share);
  return walk;
}

// A place as a row and a column of an image, or of a plane in NCHW.
struct Position {
  int image;
  int row;
  int column;
};

// How a thread's walk goes on over places that are rows of `width` columns: how far from one to its next.
struct RouteSteps {
  SmallDivisor by_width;
  int height, width;
  int down, right;

  RouteSteps() = default;
  RouteSteps(const Walks& walks, int64_t height, int64_t width)
      : by_width(width),
        height(static_cast<int>(height)),
        width(static_cast<int>(width)),
        down(static_cast<int>(walks.rows / std::max<int64_t>(width, 1))),
        right(static_cast<int>(walks.rows % std::max<int64_t>(width, 1))) {}
};

// Turns a walk's places into positions, without a division for each.
class Route {
 public:
  __device__ __forceinline__ Route(const Walks& walks, const Walk& walk, const RouteSteps& steps) : steps_(steps) {
    const int64_t image = walks.image.quotient(walk.first);
    const int rest = static_cast<int>(walk.first - image * walks.image.value), row = steps.by_width.quotient(rest);
    at = {static_cast<int>(walk.plane + image), row, rest - row * steps.width};
  }

  __device__ __forceinline__ void advance() {
    at.row += steps_.down;
    at.column += steps_.right;
    if (at.column >= steps_.width) {
      at.column -= steps_.width;
      ++at.row;
    }
    while (at.row >= steps_.height) {
      at.row -= steps_.height;
      ++at.image;
    }
  }

  Position at;

 private:
  const RouteSteps& steps_;
};

}  // namespace fastcnn::cuda
