// LRN + max-pool: one pass each. The normalised values live only between the two.

#include "../ops.h"
#include "max_pool.h"

namespace fastcnn::cpu {

Tensor lrn_pool(
    const Tensor& input, int64_t size, double alpha, double beta, double k, Sizes pool_size, Sizes pool_stride,
    Sizes pool_padding, Sizes pool_dilation, bool pool_ceil_mode) {
  const Window window = make_window(pool_size, pool_stride, pool_padding, pool_dilation, pool_ceil_mode);
  return pool(lrn(input, size, alpha, beta, k), window, false, false).first;
}

std::tuple<Tensor, Tensor> lrn_pool_codes(
    const Tensor& input, int64_t size, double alpha, double beta, double k, Sizes pool_size, Sizes pool_stride,
    Sizes pool_padding, Sizes pool_dilation, bool pool_ceil_mode) {
  const Window window = make_window(pool_size, pool_stride, pool_padding, pool_dilation, pool_ceil_mode);
  return pool(lrn(input, size, alpha, beta, k), window, false, true);
}

Tensor lrn_pool_backward(
    const Tensor& grad, const Tensor& codes, const Tensor& input, int64_t size, double alpha, double beta, double k,
    Sizes pool_size, Sizes pool_stride, Sizes pool_padding, Sizes pool_dilation, bool pool_ceil_mode) {
  const Window window = make_window(pool_size, pool_stride, pool_padding, pool_dilation, pool_ceil_mode);
  const Tensor unpooled = pool_backward(grad, codes, input.size(2), input.size(3), window, false).first;
  return lrn_backward(unpooled, input, size, alpha, beta, k);
}

}  // namespace fastcnn::cpu
