#pragma once
// How a kernel is started: on the device of its tensors, on torch's current stream there, and checked.

#include <limits>
#include <tuple>
#include <utility>

#include "../tensors.h"
#include "device.h"

#ifdef __CUDACC__
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#endif

namespace fastcnn::cuda {

#ifdef __CUDACC__

// Raise what a call of the CUDA runtime returned. The runtime keeps an error too, and the next innocent call that asks
// for one would raise it: cleared, as torch's own checks do.
inline void check(cudaError_t error) {
  if (error != cudaSuccess) {
    static_cast<void>(cudaGetLastError());
    const char* hint =
        error == cudaErrorNoKernelImageForDevice ? " (fastcnn doctor tells for which GPUs they are)" : "";
    STD_TORCH_CHECK(false, "fastcnn: a CUDA kernel could not be started: ", cudaGetErrorString(error), hint);
  }
}

// Makes the tensor's device the current one for as long as it lives; kernels go to torch's current stream.
class Device {
 public:
  explicit Device(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    void* stream = nullptr;
    FASTCNN_TORCH_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  // Run kernel(arguments...) in `blocks` blocks of `threads` threads. Nothing here waits for the GPU, so it may be
  // captured in a CUDA graph.
  template <class... Parameters, class... Arguments>
  void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, int64_t shared_bytes,
      Arguments&&... arguments) const {
    static_assert(sizeof...(Parameters) == sizeof...(Arguments));
    if (blocks == 0) {
      return;
    }
    STD_TORCH_CHECK(blocks <= std::numeric_limits<int32_t>::max(), "fastcnn: the tensor needs ", blocks,
        " blocks, more than one launch can have");
    if (shared_bytes > 48 * 1024) {  // more must be asked for
      check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
          static_cast<int>(shared_bytes)));
    }
    std::tuple<Parameters...> values(std::forward<Arguments>(arguments)...);
    std::apply(
        [&](auto&... value) {
          void* pointers[] = {const_cast<void*>(static_cast<const void*>(&value))...};
          check(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(static_cast<unsigned>(blocks)),
              dim3(static_cast<unsigned>(threads)), pointers, shared_bytes, stream_));
        },
        values);
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

#else

class Device {
 public:
  explicit Device(const Tensor&) {}

  template <class... Parameters, class... Arguments>
  void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, int64_t shared_bytes,
      Arguments&&... arguments) const {
    static_assert(sizeof...(Parameters) == sizeof...(Arguments));
    std::tuple<Parameters...> values(std::forward<Arguments>(arguments)...);
    host_cuda::launch([&] { std::apply(kernel, values); }, blocks, threads, shared_bytes);
  }
};

#endif

// The shared memory that a block of any supported GPU can have (sm_120 has the least).
constexpr int64_t MOST_SHARED_BYTES = 99 * 1024;

}  // namespace fastcnn::cuda
