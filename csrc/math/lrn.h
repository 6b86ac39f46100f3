#pragma once
// Local response normalization of one value: y = x * scale ** -beta, scale = k + alpha / size * (sum of x**2 over the
// window of channels).

#include <cmath>
#include <cstdint>

#include "rounding.h"

namespace fastcnn {

struct LRN {
  int64_t size;  // channels in the window, size / 2 of them before the value's own
  float alpha;   // already divided by size
  float beta;
  float k;
};

// alpha is the user's, for the whole window. A window that covers all channels wherever it stands is cut to the least
// such size: beyond the channels are zeros.
inline LRN make_norm(int64_t size, double alpha, double beta, double k, int64_t channels) {
  const int64_t reached = 2 * channels + 1;
  return {size < reached ? size : reached, static_cast<float>(alpha / static_cast<double>(size)),
      static_cast<float>(beta), static_cast<float>(k)};
}

FASTCNN_HOST_DEVICE float lrn_scale(const LRN& norm, float sum_of_squares) {
  return multiply_add(norm.alpha, sum_of_squares, norm.k);
}

// Which formula serves a beta.
enum class Power { THREE_QUARTERS, ZERO, ANY };

FASTCNN_HOST_DEVICE Power power_of(double beta) {
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
    const float root = 1.0f / sqrtf(scale), factor = root * sqrtf(root);
    return {factor, factor * root * root};
  } else if constexpr (POWER == Power::ZERO) {
    return {1.0f, 0.0f};  // beta takes it times zero, and a scale may be zero
  } else {
    const float factor = powf(scale, -norm.beta);
    return {factor, factor / scale};
  }
}

// The factors for beta 0.75, given 1 / sqrt(scale) and its square root as a GPU approximates them: products of these
// would be off by more than stock's power and quotients, so each gets a step of Newton's; none at a scale of 0 or
// infinity.
FASTCNN_HOST_DEVICE Factors refined(float scale, float root, float root_of_root) {
  const float factor = root * root_of_root, inverse = root * root;
  const float quarter = scale * factor;  // scale ** 0.25
  const float e = multiply_add(-product(quarter, quarter), product(quarter, factor), 1.0f);
  if (!(fabsf(e) < 1.0f)) {
    return {factor, factor * inverse};
  }
  const float better = multiply_add(0.25f * factor, e, factor);
  return {better, better * multiply_add(inverse, multiply_add(-scale, inverse, 1.0f), inverse)};
}

// The gradient of x, given the sum of grad * x * scale ** (-beta - 1) over the windows that hold it.
FASTCNN_HOST_DEVICE float lrn_gradient(const LRN& norm, float grad, float x, float factor, float through) {
  return multiply_add(grad, factor, -(2.0f * norm.alpha * norm.beta * x * through));
}

}  // namespace fastcnn
