#pragma once
// Stages of two steps, a thread doing both for one image after another, so that what lies between stays in its cache.

#include "threads.h"

namespace fastcnn::cpu {

// Call run(first, images) for all images: several times with one where there are as many images as threads, or once
// with all of them, whose steps then share the threads.
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
