// The operators of this library, torch.ops.fastcnn.<name>.<backend>, and the functions that run them. Their schemas have
// one home, fastcnn/ops/<stem>.py, which defines every backend's overload from one string.

#include "ops.h"

#include <torch/csrc/stable/library.h>

#define FASTCNN_IMPLEMENT(library, backend)                                                         \
  library.impl("max_pool." #backend, TORCH_BOX(&backend::max_pool));                                \
  library.impl("max_pool_codes." #backend, TORCH_BOX(&backend::max_pool_codes));                    \
  library.impl("max_pool_backward." #backend, TORCH_BOX(&backend::max_pool_backward));              \
  library.impl("lrn." #backend, TORCH_BOX(&backend::lrn));                                          \
  library.impl("lrn_backward." #backend, TORCH_BOX(&backend::lrn_backward));                        \
  library.impl("lrn_pool." #backend, TORCH_BOX(&backend::lrn_pool));                                \
  library.impl("lrn_pool_codes." #backend, TORCH_BOX(&backend::lrn_pool_codes));                    \
  library.impl("lrn_pool_backward." #backend, TORCH_BOX(&backend::lrn_pool_backward));              \
  library.impl("conv_relu." #backend, TORCH_BOX(&backend::conv_relu));                              \
  library.impl("conv_relu_backward." #backend, TORCH_BOX(&backend::conv_relu_backward));            \
  library.impl("conv_relu_pool." #backend, TORCH_BOX(&backend::conv_relu_pool));                    \
  library.impl("conv_relu_pool_codes." #backend, TORCH_BOX(&backend::conv_relu_pool_codes));        \
  library.impl("conv_relu_pool_backward." #backend, TORCH_BOX(&backend::conv_relu_pool_backward));  \
  library.impl("linear_relu." #backend, TORCH_BOX(&backend::linear_relu));                          \
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
