#pragma once
// A batch norm's arithmetic for one value, and its merging of means.

#include <cmath>

#include "rounding.h"

namespace fastcnn {

// One over the standard deviation; on the GPU as stock has it, in a tenth of the instructions of a root and a quotient.
FASTCNN_HOST_DEVICE float inverse_deviation(float variance, float eps) {
#ifdef __CUDA_ARCH__
  return rsqrtf(variance + eps);
#else
  return 1.0f / sqrtf(variance + eps);
#endif
}

// scale: the weight over the standard deviation. The mean is subtracted first: within the bias it would cancel digits
// where values lie far from zero.
FASTCNN_HOST_DEVICE float normalize(float x, float mean, float scale, float bias) {
  return multiply_add(x - mean, scale, bias);
}

// The origin of a channel's sums: one of its own values, so that a mean far from zero costs no precision.
FASTCNN_HOST_DEVICE float origin_of(float first) { return first - first == 0.0f ? first : 0.0f; }

// part / all, on the GPU to two units in the last place.
template <class Real>
FASTCNN_HOST_DEVICE Real share_of(Real part, Real all) {
#ifdef __CUDA_ARCH__
  return __fdividef(part, all);
#else
  return part / all;
#endif
}

// Mean and sum of squared deviations of some values.
template <class Real>
struct Moments {
  Real mean;
  Real squares;
  Real count;

  // Merge others into these (Chan, Golub, LeVeque, 1979).
  FASTCNN_HOST_DEVICE void merge(const Moments& other) {
    if (other.count != 0) {
      merge(other, share_of(other.count, count + other.count));
    }
  }

  // The same, given the others' share of all.
  FASTCNN_HOST_DEVICE void merge(const Moments& other, Real share) {
    const Real distance = other.mean - mean, moved = mean + distance * share;
    mean = moved == moved ? moved : mean * (1 - share) + other.mean * share;  // one infinity stays one
    squares += other.squares + distance * distance * (count * share);
    count += other.count;
  }
};

}  // namespace fastcnn
