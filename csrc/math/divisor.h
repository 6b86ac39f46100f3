#pragma once
// Division by numbers that are known before a kernel starts.

#include <cstdint>

#include "host_device.h"

namespace fastcnn {

// Divides numbers below 2^31 by two integer instructions (Granlund, Montgomery, 1994): a division is a subroutine on
// the GPU.
struct SmallDivisor {
  uint32_t factor;
  int32_t shift;

  SmallDivisor() = default;
  SmallDivisor(int64_t divisor) : factor(0), shift(31) {  // of what is larger than any number
    if (divisor >= 1 && divisor <= int64_t{1} << 31) {
      for (shift = 0; int64_t{1} << shift < divisor; ++shift) {
      }
      const uint64_t rest = (uint64_t{1} << shift) - static_cast<uint64_t>(divisor);
      factor = static_cast<uint32_t>((rest << 32) / static_cast<uint64_t>(divisor) + 1);
    }
  }

  FASTCNN_HOST_DEVICE int32_t quotient(int32_t number) const {
    const auto n = static_cast<uint32_t>(number);
    const auto high = static_cast<uint32_t>(static_cast<uint64_t>(n) * factor >> 32);
    return static_cast<int32_t>((high + n) >> shift);
  }
};

// Divides numbers below 2^52, larger ones by a multiplication in float64.
struct Divisor {
  int64_t value;
  double inverse;
  SmallDivisor small;

  Divisor() = default;
  Divisor(int64_t divisor) : value(divisor), inverse(1.0 / static_cast<double>(divisor)), small(divisor) {}

  FASTCNN_HOST_DEVICE int64_t quotient(int64_t number) const {
    if (number >> 31 == 0) {
      return small.quotient(static_cast<int32_t>(number));
    }
    const auto close = static_cast<int64_t>(static_cast<double>(number) * inverse);  // off by one at most
    const int64_t rest = number - close * value;
    return close + (rest >= value ? 1 : 0) - (rest < 0 ? 1 : 0);
  }
};

}  // namespace fastcnn
