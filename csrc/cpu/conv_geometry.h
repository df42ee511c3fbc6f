// SPDX-License-Identifier: Apache-2.0
// Where the positions of a convolution lie: always three axes, of which the leading ones may have size 1.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "common.h"

namespace fisherfast {

using Axes = std::array<int64_t, 3>;

inline int64_t product(const Axes& axes) { return axes[0] * axes[1] * axes[2]; }

// The input is brought into a frame of exactly the pixels that the positions of g reach: zeros where it is outside.
struct ConvGeometry {
  Axes input, positions, kernel, stride, padding, dilation, frame;

  // One integer for each of 1 to 3 axes; stride, padding and dilation may be empty.
  ConvGeometry(const std::vector<int64_t>& input, const std::vector<int64_t>& positions, const std::vector<int64_t>& kernel,
               const std::vector<int64_t>& stride, const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation);

  // Pixels of the frame: the first one that position p looks at; how much further kernel offset k is.
  std::vector<int64_t> position_pixels() const { return grid(positions, stride); }
  std::vector<int64_t> offset_pixels() const { return grid(kernel, dilation); }

 private:
  std::vector<int64_t> grid(const Axes& counts, const Axes& steps) const;
};

// Of [N, C, *S]: S; and how far apart neighbours along each of three axes are, 0 along an absent one.
std::vector<int64_t> sizes_of(const Tensor& tensor);
Axes steps_of(const Tensor& tensor);

// One position of an input image.
struct Pixel {
  int64_t from;  // its place in the image, in elements
  int64_t to;    // its pixel of the frame, or -1 if nothing looks at it
  int64_t run;   // how many positions lie side by side in memory from here on
  int64_t line;  // and how many of those do so in the frame
};

// Of x, with the frame around it, and of g, whose frame is itself.
std::vector<Pixel> pixels_of(const Tensor& tensor, const Axes& size, const Axes& padding, const Axes& frame);

// The pixels of the frame that no position of the input reaches.
std::vector<int64_t> holes_of(const std::vector<Pixel>& pixels, const Axes& frame);

}  // namespace fisherfast
