#pragma once
// Stages of two steps: a thread does both for one image after another, so that the values between stay in its cache.

#include "threads.h"

namespace fastcnn::cpu {

// Call run(first, images) for all images: with one image at a time where there are at least as many as threads, else
// once with all of them; then the threads share each step.
template <class Run>
void each_image(const Layout& layout, const Run& run) {
  if (layout.images < static_cast<int64_t>(torch::stable::get_num_threads())) {
    run(0, layout.images);
    return;
  }
  parallel(layout.images, layout.channels * layout.pixels * 8, [&](int64_t begin, int64_t end) {
    for (int64_t image = begin; image < end; ++image) {
      run(image, 1);
    }
  });
}

}  // namespace fastcnn::cpu
