// The operators of this library, torch.ops.fastcnn.<name>.cpu, and the functions that run them. Their schemas have one
// home, fastcnn/ops/<stem>.py, which defines every backend's overload from one string.

#include <torch/csrc/stable/library.h>

#include "cpu/ops.h"

STABLE_TORCH_LIBRARY_IMPL(fastcnn, CPU, library) {
  using namespace fastcnn;
  library.impl("max_pool.cpu", TORCH_BOX(&max_pool));
  library.impl("max_pool_codes.cpu", TORCH_BOX(&max_pool_codes));
  library.impl("max_pool_backward.cpu", TORCH_BOX(&max_pool_backward));
  library.impl("lrn.cpu", TORCH_BOX(&lrn));
  library.impl("lrn_backward.cpu", TORCH_BOX(&lrn_backward));
  library.impl("lrn_pool.cpu", TORCH_BOX(&lrn_pool));
  library.impl("lrn_pool_codes.cpu", TORCH_BOX(&lrn_pool_codes));
  library.impl("lrn_pool_backward.cpu", TORCH_BOX(&lrn_pool_backward));
  library.impl("conv_relu.cpu", TORCH_BOX(&conv_relu));
  library.impl("conv_relu_backward.cpu", TORCH_BOX(&conv_relu_backward));
  library.impl("conv_relu_pool.cpu", TORCH_BOX(&conv_relu_pool));
  library.impl("conv_relu_pool_codes.cpu", TORCH_BOX(&conv_relu_pool_codes));
  library.impl("conv_relu_pool_backward.cpu", TORCH_BOX(&conv_relu_pool_backward));
  library.impl("linear_relu.cpu", TORCH_BOX(&linear_relu));
  library.impl("linear_relu_backward.cpu", TORCH_BOX(&linear_relu_backward));
}
