#pragma once
// How threads share the planes of a pool in NCHW whose windows lie two pixels apart: each has one column of windows, or
// of patches of 2x2 pixels, or a few, and goes down a strip of their rows, so that what neighbouring rows share stays
// in registers. Neighbouring threads have neighbouring columns, so that they share lines of memory.

#include "max_pool.h"
#include "walk.h"

namespace fastcnn::cuda {

// Planes of `rows` rows of `columns` columns: `down` x `across` threads a plane, the strips of one `height` rows long.
// A block has `teams` teams of `threads` threads; `shares` teams share a plane.
struct Strips {
  int rows, columns;
  int height;
  int across;
  int places;
  int planes;
  int threads, teams, shares;
  SmallDivisor by_across, by_threads, by_shares, by_channels;
  int channels;
};

constexpr int64_t LONGEST_STRIP = 32, LEAST_THREADS = int64_t{1} << 17;

// Strips as long as there are threads enough; of `step` rows at a time, and `each` columns a thread.
inline Strips make_strips(int64_t images, int64_t channels, int64_t rows, int64_t columns, int64_t step, int64_t each) {
  const int64_t planes = images * channels, across = ceil_div(columns, each);
  int64_t down = ceil_div(rows, LONGEST_STRIP);
  while (down * step < rows && planes * across * down < LEAST_THREADS) {
    down *= 2;
  }
  const int64_t height = round_up(ceil_div(rows, down), step), places = across * ceil_div(rows, height);
  const int64_t threads = clamp(places, 1, BLOCK_THREADS);
  Strips strips{};
  strips.rows = narrow(rows);
  strips.columns = narrow(columns);
  strips.height = narrow(height);
  strips.across = narrow(across);
  strips.places = narrow(places);
  strips.planes = narrow(planes);
  strips.channels = narrow(channels);
  strips.threads = narrow(threads);
  strips.teams = narrow(BLOCK_THREADS / threads);
  strips.shares = narrow(ceil_div(places, threads));
  strips.by_across = across;
  strips.by_threads = threads;
  strips.by_shares = strips.shares;
  strips.by_channels = channels;
  return strips;
}

// The same as walks, for the launch and for sums.
inline Walks walks_of(const Strips& strips) {
  Walks walks{};
  walks.channels = strips.channels;
  walks.channels_last = false;
  walks.parts = strips.planes;
  walks.places = strips.places;
  walks.share = walks.rows = strips.threads;
  walks.shares = strips.shares;
  walks.lanes = 1;
  walks.teams = strips.teams;
  walks.threads = static_cast<int>(round_up(strips.threads * strips.teams, WARP));
  STD_TORCH_CHECK(
      walks.parts * walks.shares < MOST_TEAMS - BLOCK_THREADS, "fastcnn: ", walks.parts, " planes are too many");
  return walks;
}

// What a thread works on: rows of a plane, from the first to the end, and a column.
struct Strip {
  int plane, share;
  int thread;  // of its team
  int row, end;
  int column;
  bool active;  // its team has a plane

  __device__ __forceinline__ explicit Strip(const Strips& strips) {
    const auto slot = static_cast<int>(threadIdx.x), team = strips.by_threads.quotient(slot);
    const int number = static_cast<int>(blockIdx.x) * strips.teams + team;
    plane = strips.by_shares.quotient(number);
    share = number - plane * strips.shares;
    thread = slot - team * strips.threads;
    active = team < strips.teams && plane < strips.planes;
    const int place = share * strips.threads + thread, strip = strips.by_across.quotient(place);
    row = strip * strips.height;
    column = place - strip * strips.across;
    const int last = row + strips.height;
    end = !active || place >= strips.places ? 0 : last < strips.rows ? last : strips.rows;
  }

  __device__ __forceinline__ int channel(const Strips& strips) const {
    return plane - strips.by_channels.quotient(plane) * strips.channels;
  }

  // As sums see it.
  __device__ __forceinline__ Walk walk() const {
    Walk walk{};
    walk.plane = plane;
    walk.share = share;
    walk.row = thread;
    walk.active = active;
    return walk;
  }
};

}  // namespace fastcnn::cuda
