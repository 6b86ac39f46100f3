#pragma once

// Per-element mathematics is compiled for the CPU by any C++ compiler and for the GPU by nvcc.
#ifdef __CUDACC__
#define FASTCNN_HOST_DEVICE __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define FASTCNN_HOST_DEVICE inline __attribute__((always_inline))
#else
#define FASTCNN_HOST_DEVICE inline
#endif
