#pragma once
// The two choices of the fused stages: which value of a window wins, and which value ReLU passes.

#include "host_device.h"

namespace fastcnn {

// Whether a later value of a window replaces the best so far: the first of equals stays, NaN beats everything before.
// Without short circuits, so that loops over it vectorize.
FASTCNN_HOST_DEVICE bool wins(float value, float best) { return (value > best) | (value != value); }

// ReLU keeps NaN, and so does its gradient: only what is not above zero for certain is off.
FASTCNN_HOST_DEVICE bool relu_off(float value) { return value <= 0.0f; }

FASTCNN_HOST_DEVICE float relu(float value) { return relu_off(value) ? 0.0f : value; }

}  // namespace fastcnn
