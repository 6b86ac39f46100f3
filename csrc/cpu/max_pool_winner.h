#pragma once
// The winner of a window so far, and what becomes of it.

#include <cstdint>
#include <limits>

#include "../math/select.h"
#include "../math/window.h"

namespace fastcnn::cpu {

constexpr float LOWEST = -std::numeric_limits<float>::infinity();
// The code of a window that covers no pixel: above RELU_OFF whatever a row adds to it, so that it is stored as
// RELU_OFF.
constexpr int32_t NO_PLACE = 1 << 16;
constexpr int64_t LANES = 16;

FASTCNN_HOST_DEVICE void take(float value, int32_t place, float& best, int32_t& code) {
  const bool won = wins(value, best);
  best = won ? value : best;
  code = won ? place : code;
}

// Turn the best of each window, and its place, into an output row.
template <class T, bool CODES, bool RELU>
FASTCNN_HOST_DEVICE void finish(
    float value, int32_t winner, int64_t i, T* __restrict output, uint8_t* __restrict code) {
  if constexpr (CODES) {
    winner = winner < RELU_OFF ? winner : RELU_OFF;
    code[i] = static_cast<uint8_t>(RELU && relu_off(value) ? RELU_OFF : winner);
  }
  output[i] = static_cast<T>(RELU ? relu(value) : value);
}

}  // namespace fastcnn::cpu
