#pragma once
// Local response normalisation of one value: y = x * scale ** -beta, scale = k + alpha / size * (sum of x**2 over the
// window of channels).

#include <cmath>
#include <cstdint>

#include "host_device.h"

namespace fastcnn {

struct LRN {
  int64_t size;  // channels in the window, size / 2 of them before the value's own
  float alpha;   // already divided by size
  float beta;
  float k;
};

FASTCNN_HOST_DEVICE float lrn_scale(const LRN& norm, float sum_of_squares) {
  return norm.k + norm.alpha * sum_of_squares;
}

// Which formula serves a beta.
enum class Power { THREE_QUARTERS, ZERO, ANY };

inline Power power_of(double beta) {
  return beta == 0.75 ? Power::THREE_QUARTERS : (beta == 0.0 ? Power::ZERO : Power::ANY);
}

// scale ** -beta.
template <Power POWER>
FASTCNN_HOST_DEVICE float lrn_factor(const LRN& norm, float scale) {
  if constexpr (POWER == Power::THREE_QUARTERS) {
    const float root = sqrtf(scale);
    return 1.0f / (root * sqrtf(root));
  } else if constexpr (POWER == Power::ZERO) {
    return 1.0f;
  } else {
    return powf(scale, -norm.beta);
  }
}

// What a channel hands to the gradient of each channel in its window: grad * x * scale ** (-beta - 1).
FASTCNN_HOST_DEVICE float lrn_through(float grad, float x, float factor, float scale) {
  return grad * x * (factor / scale);
}

// The gradient of x, given the sum of lrn_through over the windows that hold it.
FASTCNN_HOST_DEVICE float lrn_gradient(const LRN& norm, float grad, float x, float factor, float through) {
  return grad * factor - 2.0f * norm.alpha * norm.beta * x * through;
}

}  // namespace fastcnn
