#pragma once
// scale ** -0.75 by multiplications alone, for the CPU: its vectors take square roots and quotients many times slower.

#include <bit>

#include "lrn.h"

namespace fastcnn {

// Whether `lrn_factors` may be had by multiplication: the scale is at least k, and must not be near 0 or infinite.
inline bool may_multiply(const LRN& norm) { return norm.k > 1e-30f; }

constexpr int32_t INFINITE = 0x7f800000;  // the bits of infinity; NaN's are above

FASTCNN_HOST_DEVICE int32_t bits_of(float value) { return std::bit_cast<int32_t>(value); }

// The factor of `lrn_factors` for beta 0.75. The first guess multiplies the logarithm, which a float's bits nearly are;
// then twice y *= (1 - e) ** -0.25 where e = 1 - scale ** 3 * y ** 4: by its best quadratic polynomial for the guess's
// e, at most 0.17, and by its tangent. The error is below 2.2 units of 2 ** -24; with square roots it is below 4.
FASTCNN_HOST_DEVICE float multiplied_factor(float scale) {
  const int32_t bits = bits_of(scale);
  float y = std::bit_cast<float>(0x6f145800 - (bits - (bits >> 2)));
  float quarter = scale * y;
  float e = 1.0f - quarter * quarter * (quarter * y);
  y += y * e * (0.24999335f + e * (0.1579469f + e * 0.11935271f));
  quarter = scale * y;
  e = 1.0f - quarter * quarter * (quarter * y);
  return y + y * e * 0.25f;
}

}  // namespace fastcnn
