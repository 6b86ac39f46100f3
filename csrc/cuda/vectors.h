#pragma once
// How elementwise kernels walk over a tensor: by 16-byte vectors of channels or of pixels where that fits.

#include "walk.h"

namespace fastcnn::cuda {

// Call run(N, ALONG_CHANNELS, walks) for walks of at most so many blocks: 16-byte vectors where rows and pointers
// allow, else single elements.
template <class T, class Run>
void with_vectors(const Layout& layout, bool aligned, int64_t depth, int64_t most_blocks, const Run& run,
    int64_t plane_depth = PLANE_DEPTH) {
  constexpr int N = WIDTH<T>;
  const auto one = std::integral_constant<int, 1>{};
  const auto many = std::integral_constant<int, N>{};
  const auto& [images, channels, pixels, channels_last] = layout;
  if (aligned && channels_last && channels % N == 0) {
    run(many, std::true_type{}, make_walks(images, channels, pixels, true, N, channels, depth, most_blocks));
  } else if (aligned && !channels_last && pixels % N == 0) {
    run(many, std::false_type{},
        make_walks(images, channels, pixels / N, false, 1, N, depth, most_blocks, plane_depth));
  } else {
    const int64_t stride = channels_last ? channels : 1;
    run(one, std::true_type{},
        make_walks(images, channels, pixels, channels_last, 1, stride, depth, most_blocks, plane_depth));
  }
}

}  // namespace fastcnn::cuda
