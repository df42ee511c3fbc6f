// SPDX-License-Identifier: Apache-2.0
// Images as the kernels want them: in full precision, position by position, neighbouring channels side by side.
#pragma once

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
  return {static_cast<const S*>(tensor.const_data_ptr()), tensor.stride(0), tensor.stride(1), tensor.size(1),
          pixels.data(), static_cast<int64_t>(pixels.size()), holes.data(), static_cast<int64_t>(holes.size())};
}

}  // namespace fisherfast
