#pragma once
// Sums in a fixed order, so that they do not depend on the number of threads.

#include "../tensors.h"

namespace fastcnn::cpu {

constexpr int64_t LANES = 16;       // sums side by side, which vectorize without reassociation and stay in registers
constexpr int64_t SUM_BLOCK = 256;  // values that are added up in float32, before they are in float64

// Add up the lanes, in pairs: fewer roundings than one after another.
template <class Real>
FASTCNN_HOST_DEVICE Real added(Real (&lanes)[LANES]) {
  for (int64_t half = LANES / 2; half > 0; half /= 2) {
    for (int64_t lane = 0; lane < half; ++lane) {
      lanes[lane] += lanes[lane + half];
    }
  }
  return lanes[0];
}

// Call term(i, lane) for i in [0, count): each value goes to the lane after the one before.
template <class Term>
FASTCNN_HOST_DEVICE void by_lanes(int64_t count, const Term& term) {
  const int64_t whole = count / LANES * LANES;
  for (int64_t i = 0; i < whole; i += LANES) {
    for (int64_t lane = 0; lane < LANES; ++lane) {
      term(i + lane, lane);
    }
  }
  for (int64_t i = whole; i < count; ++i) {
    term(i, i - whole);
  }
}

// The sum of term(i) for i in [0, count), in Real throughout: float suits a block of values.
template <class Real, class Term>
FASTCNN_HOST_DEVICE Real sum_of(int64_t count, const Term& term) {
  Real lanes[LANES] = {};
  by_lanes(count, [&](int64_t i, int64_t lane) { lanes[lane] += static_cast<Real>(term(i)); });
  return added(lanes);
}

// The sum of any number of values.
template <class T>
FASTCNN_HOST_DEVICE float sum(const T* __restrict values, int64_t count) {
  double total = 0.0;
  for (int64_t start = 0; start < count; start += SUM_BLOCK) {
    const T* __restrict from = values + start;
    total += sum_of<float>(std::min(SUM_BLOCK, count - start), [&](int64_t i) { return static_cast<float>(from[i]); });
  }
  return static_cast<float>(total);
}

// Add up partial sums, (lines, C), to (C,).
template <class T>
void add_partial_sums(const float* sums, int64_t lines, int64_t channels, T* total) {
  std::vector<double> added(channels);
  for (int64_t line = 0; line < lines; ++line) {
    for (int64_t c = 0; c < channels; ++c) {
      added[c] += sums[line * channels + c];
    }
  }
  for (int64_t c = 0; c < channels; ++c) {
    total[c] = static_cast<T>(static_cast<float>(added[c]));
  }
}

}  // namespace fastcnn::cpu
