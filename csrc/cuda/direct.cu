#include "convolution.h"
namespace fastcnn::cuda {
std::pair<Tensor, Tensor> direct(const Convolution&, Fused) { STD_TORCH_CHECK(false, "direct"); }
}  // namespace fastcnn::cuda
