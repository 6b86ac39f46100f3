#pragma once
// Arithmetic that rounds in one way only. Where equal values meet in a pool after it they must stay equal, but a
// compiler that may join a multiplication with an addition does so at one place of an unrolled loop and not at another.
// nvcc joins them unless told so; the CPU's kernels are built without (-ffp-contract=off).

#include "host_device.h"

namespace fastcnn {

// a * b, rounded before anything is added.
FASTCNN_HOST_DEVICE float product(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

// a * b + c, on the GPU rounded once.
FASTCNN_HOST_DEVICE float multiply_add(float a, float b, float c) {
#ifdef __CUDA_ARCH__
  return __fmaf_rn(a, b, c);
#else
  return a * b + c;
#endif
}

}  // namespace fastcnn
