#pragma once
// How the CPU operators use the processor: its vectors and its threads.

#include <algorithm>

#include "../tensors.h"

// The hot loops are compiled several times and the processor's best version is taken when the library is loaded.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__SANITIZE_ADDRESS__)
#define FASTCNN_CLONES __attribute__((target_clones("default", "avx2", "avx512f")))
#else
#define FASTCNN_CLONES
#endif

namespace fastcnn::cpu {

// Split [0, count) among torch's threads; an item costs about `cost` simple operations.
template <class Run>
void parallel(int64_t count, int64_t cost, const Run& run) {
  constexpr int64_t COST_OF_A_THREAD = 32768;
  const int64_t least = std::max<int64_t>(1, COST_OF_A_THREAD / std::max<int64_t>(cost, 1));  // items of a thread
  if (count > least) {
    torch::stable::parallel_for(0, count, least, run);
  } else if (count > 0) {
    run(int64_t{0}, count);
  }
}

}  // namespace fastcnn::cpu
