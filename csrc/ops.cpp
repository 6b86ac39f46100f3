// The operators of this library, torch.ops.fastcnn.<name>.<backend>, and the functions that run them. Their schemas
// have one home, fastcnn/ops/<stem>.py, which defines every backend's overload from one string.

#include "ops.h"

#include <torch/csrc/stable/library.h>

namespace fastcnn {
namespace {

// In a schema a window is one list, of size, stride, padding, dilation and ceil_mode, and a convolution's settings are
// another, of stride, padding, dilation and groups: every list costs a call half a microsecond.
Sizes pair(Sizes numbers, int64_t i) { return {numbers.data() + 2 * i, 2}; }

void check_length(Sizes numbers, size_t length) {
  STD_TORCH_CHECK(numbers.size() == length, "fastcnn: expected ", length, " numbers, got ", numbers.size());
}

// A pool's window. Its numbers fit an int, as torch's pools require, so sums and products of a few do not overflow.
Window pool_window(Sizes numbers) {
  check_length(numbers, 9);
  for (int64_t number : numbers) {
    STD_TORCH_CHECK(number >= 0 && number <= std::numeric_limits<int32_t>::max(),
        "fastcnn: expected numbers of a window from 0 to 2147483647, got ", number);
  }
  return make_window(pair(numbers, 0), pair(numbers, 1), pair(numbers, 2), pair(numbers, 3), numbers[8] != 0);
}

template <auto OPERATOR, class... Before>
auto with_window(Before... before, Sizes window) {
  return OPERATOR(before..., pool_window(window));
}

template <auto OPERATOR, class... Pool>
auto with_convolution(const Tensor& input, const Tensor& weight, std::optional<Tensor> bias, Sizes convolution,
    std::optional<std::string> algorithm, Pool... pool) {
  check_length(convolution, 7);
  return OPERATOR(input, weight, bias, pair(convolution, 0), pair(convolution, 1), pair(convolution, 2), convolution[6],
      algorithm, pool_window(pool)...);
}

using In = const Tensor&;
using Maybe = std::optional<Tensor>;

}  // namespace
}  // namespace fastcnn

#define FASTCNN_IMPLEMENT(library, backend)                                                                           \
  library.impl("max_pool." #backend, TORCH_BOX((&with_window<&backend::max_pool, In>)));                              \
  library.impl("max_pool_codes." #backend, TORCH_BOX((&with_window<&backend::max_pool_codes, In>)));                  \
  library.impl("max_pool_backward." #backend,                                                                         \
      TORCH_BOX((&with_window<&backend::max_pool_backward, In, In, int64_t, int64_t>)));                              \
  library.impl("lrn." #backend, TORCH_BOX(&backend::lrn));                                                            \
  library.impl("lrn_backward." #backend, TORCH_BOX(&backend::lrn_backward));                                          \
  library.impl(                                                                                                       \
      "lrn_pool." #backend, TORCH_BOX((&with_window<&backend::lrn_pool, In, int64_t, double, double, double>)));      \
  library.impl("lrn_pool_codes." #backend,                                                                            \
      TORCH_BOX((&with_window<&backend::lrn_pool_codes, In, int64_t, double, double, double>)));                      \
  library.impl("lrn_pool_backward." #backend,                                                                         \
      TORCH_BOX((&with_window<&backend::lrn_pool_backward, In, In, In, int64_t, double, double, double>)));           \
  library.impl("conv_relu." #backend, TORCH_BOX((&with_convolution<&backend::conv_relu>)));                           \
  library.impl("conv_relu_backward." #backend, TORCH_BOX(&backend::conv_relu_backward));                              \
  library.impl("conv_relu_pool." #backend, TORCH_BOX((&with_convolution<&backend::conv_relu_pool, Sizes>)));          \
  library.impl(                                                                                                       \
      "conv_relu_pool_codes." #backend, TORCH_BOX((&with_convolution<&backend::conv_relu_pool_codes, Sizes>)));       \
  library.impl("conv_relu_pool_backward." #backend,                                                                   \
      TORCH_BOX((&with_window<&backend::conv_relu_pool_backward, In, In, int64_t, int64_t, bool>)));                  \
  library.impl("bn_relu_statistics." #backend, TORCH_BOX(&backend::bn_relu_statistics));                              \
  library.impl("bn_relu." #backend, TORCH_BOX(&backend::bn_relu));                                                    \
  library.impl("bn_relu_backward." #backend, TORCH_BOX(&backend::bn_relu_backward));                                  \
  library.impl(                                                                                                       \
      "bn_relu_pool." #backend, TORCH_BOX((&with_window<&backend::bn_relu_pool, In, In, In, Maybe, Maybe, double>))); \
  library.impl("bn_relu_pool_codes." #backend,                                                                        \
      TORCH_BOX((&with_window<&backend::bn_relu_pool_codes, In, In, In, Maybe, Maybe, double>)));                     \
  library.impl("bn_relu_pool_backward." #backend,                                                                     \
      TORCH_BOX((&with_window<&backend::bn_relu_pool_backward, In, In, In, In, In, Maybe, Maybe, double, bool>)));    \
  library.impl("add_relu." #backend, TORCH_BOX(&backend::add_relu));                                                  \
  library.impl("add_relu_backward." #backend, TORCH_BOX(&backend::add_relu_backward));                                \
  library.impl("linear_relu." #backend, TORCH_BOX(&backend::linear_relu));                                            \
  library.impl("linear_relu_backward." #backend, TORCH_BOX(&backend::linear_relu_backward))

using namespace fastcnn;

#ifdef FASTCNN_HOST_CUDA  // the tests' build: the CUDA kernels' source, played on the CPU
STABLE_TORCH_LIBRARY_IMPL(fastcnn, CPU, library) { FASTCNN_IMPLEMENT(library, cuda); }
#else
STABLE_TORCH_LIBRARY_IMPL(fastcnn, CPU, library) { FASTCNN_IMPLEMENT(library, cpu); }
#ifdef FASTCNN_CUDA
STABLE_TORCH_LIBRARY_IMPL(fastcnn, CUDA, library) { FASTCNN_IMPLEMENT(library, cuda); }
#endif
#endif
