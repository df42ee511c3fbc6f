// SPDX-License-Identifier: Apache-2.0
// Images as the kernels want them: in full precision, position by position, neighbouring channels side by side.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/conv_geometry.h"
#include "cpu/cpu.h"

namespace fisherfast {

// Where images come from, and how their positions are to lie.
template <class S>
struct Images {
  const S* data;
  int64_t stride_n, stride_c, channels;
  const Pixel* pixels;
  int64_t pixel_count;
  const int64_t* holes;  // pixels of the frame that are to be zero
  int64_t hole_count;
};

template <class S>
Images<S> images_of(const Tensor& tensor, const std::vector<Pixel>& pixels, const std::vector<int64_t>& holes) {
  return {static_cast<const S*>(tensor.const_data_ptr()),
          tensor.stride(0),
          tensor.stride(1),
          tensor.size(1),
          pixels.data(),
          static_cast<int64_t>(pixels.size()),
          holes.data(),
          static_cast<int64_t>(holes.size())};
}

// Samples of images: one each, or those between the offsets.
struct ImageSamples {
  int64_t N;
  const int64_t* offsets;  // or null

  int64_t begin(int64_t n) const { return offsets ? offsets[n] : n; }

  // The end of the samples from first on that fit into a number of images: at least one.
  int64_t fit(int64_t first, int64_t images) const {
    int64_t last = first + 1;
    while (last < N && begin(last + 1) - begin(first) <= images) ++last;
    return last;
  }

  int64_t longest() const {
    int64_t images = 0;
    for (int64_t n = 0; n < N; ++n) images = std::max(images, begin(n + 1) - begin(n));
    return images;
  }
};

// One call of conv_sq_. Hidden, as torch's stable Tensor is.
struct __attribute__((visibility("hidden"))) ConvCall {
  const Tensor &x, &g;
  ConvGeometry geometry;
  int64_t groups;
  ImageSamples samples;
  const float* weight;  // [N] or null
  double scale;
  Sink acc, total, sqnorm;
};

}  // namespace fisherfast
