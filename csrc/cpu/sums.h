#pragma once
// Sums in a fixed order, so that they do not depend on the number of threads.

#include "../tensors.h"

namespace fastcnn::cpu {

// The sum of values in float32: sixteen running sums, so that it vectorizes without reassociation.
template <class T>
FASTCNN_HOST_DEVICE float sum(const T* __restrict values, int64_t count) {
  constexpr int64_t LANES = 16;
  float lanes[LANES] = {};
  const int64_t whole = count / LANES * LANES;
  for (int64_t i = 0; i < whole; i += LANES) {
    for (int64_t lane = 0; lane < LANES; ++lane) {
      lanes[lane] += static_cast<float>(values[i + lane]);
    }
  }
  for (int64_t i = whole; i < count; ++i) {
    lanes[i - whole] += static_cast<float>(values[i]);
  }
  for (int64_t half = LANES / 2; half > 0; half /= 2) {
    for (int64_t lane = 0; lane < half; ++lane) {
      lanes[lane] += lanes[lane + half];
    }
  }
  return lanes[0];
}

// The sum of values in float64: exact to the last place of float32, as torch's own mean is.
template <class T>
FASTCNN_HOST_DEVICE double wide_sum(const T* __restrict values, int64_t count) {
  constexpr int64_t LANES = 16;
  double lanes[LANES] = {};
  const int64_t whole = count / LANES * LANES;
  for (int64_t i = 0; i < whole; i += LANES) {
    for (int64_t lane = 0; lane < LANES; ++lane) {
      lanes[lane] += static_cast<double>(static_cast<float>(values[i + lane]));
    }
  }
  for (int64_t i = whole; i < count; ++i) {
    lanes[i - whole] += static_cast<double>(static_cast<float>(values[i]));
  }
  double total = 0.0;
  for (double lane : lanes) {
    total += lane;
  }
  return total;
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
