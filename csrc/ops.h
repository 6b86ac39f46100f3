#pragma once
// The operators of every backend.

#include <optional>
#include <string>
#include <tuple>

#include "tensors.h"

namespace fastcnn::cpu {
#include "operators.h"
}  // namespace fastcnn::cpu

namespace fastcnn::cuda {
#include "operators.h"
}  // namespace fastcnn::cuda
