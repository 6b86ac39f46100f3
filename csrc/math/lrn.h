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

// scale ** -beta and scale ** (-beta - 1).
struct Factors {
  float factor;
  float next;
};

template <Power POWER>
FASTCNN_HOST_DEVICE Factors lrn_factors(const LRN& norm, float scale) {
  if constexpr (POWER == Power::THREE_QUARTERS) {
    const float root = sqrtf(scale);
    const float factor = 1.0f / (root * sqrtf(root));
    // factor ** 2 * root is 1 / scale without a division; an infinite root must not meet the zero that factor then is
    const float finite = root < 1e30f ? root : 1e30f;
    return {factor, factor * finite * factor * factor};
  } else if constexpr (POWER == Power::ZERO) {
    return {1.0f, 1.0f / scale};
  } else {
    const float factor = powf(scale, -norm.beta);
    return {factor, factor / scale};
  }
}

// The gradient of x, given the sum of grad * x * scale ** (-beta - 1) over the windows that hold it.
FASTCNN_HOST_DEVICE float lrn_gradient(const LRN& norm, float grad, float x, float factor, float through) {
  return grad * factor - 2.0f * norm.alpha * norm.beta * x * through;
}

}  // namespace fastcnn
