#pragma once
// The operators' signatures, as the schemas in fastcnn/ops/<stem>.py have them.

#include <optional>
#include <string>
#include <tuple>

#include "tensors.h"

namespace fastcnn {

Tensor max_pool(const Tensor& input, Sizes size, Sizes stride, Sizes padding, Sizes dilation, bool ceil_mode);
std::tuple<Tensor, Tensor> max_pool_codes(
    const Tensor& input, Sizes size, Sizes stride, Sizes padding, Sizes dilation, bool ceil_mode);
Tensor max_pool_backward(
    const Tensor& grad, const Tensor& codes, int64_t height, int64_t width, Sizes size, Sizes stride, Sizes padding,
    Sizes dilation, bool ceil_mode);

Tensor lrn(const Tensor& input, int64_t size, double alpha, double beta, double k);
Tensor lrn_backward(const Tensor& grad, const Tensor& input, int64_t size, double alpha, double beta, double k);

}  // namespace fastcnn
