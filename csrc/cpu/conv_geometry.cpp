// SPDX-License-Identifier: Apache-2.0
#include "cpu/conv_geometry.h"

#include <algorithm>

namespace fisherfast {
namespace {

// The last values of a list, in front of them what an absent axis has.
template <class List>
Axes last_axes(const List& values, std::size_t skip, int64_t absent) {
  Axes axes;
  axes.fill(absent);
  for (std::size_t i = skip; i < values.size(); ++i) axes[i + 3 - values.size()] = values[i];
  return axes;
}

}  // namespace

ConvGeometry::ConvGeometry(const std::vector<int64_t>& input, const std::vector<int64_t>& positions,
                           const std::vector<int64_t>& kernel, const std::vector<int64_t>& stride,
                           const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation)
    : input(last_axes(input, 0, 1)),
      positions(last_axes(positions, 0, 1)),
      kernel(last_axes(kernel, 0, 1)),
      stride(last_axes(stride, 0, 1)),
      padding(last_axes(padding, 0, 0)),
      dilation(last_axes(dilation, 0, 1)) {
  for (int a = 0; a < 3; ++a)
    frame[a] = (this->positions[a] - 1) * this->stride[a] + (this->kernel[a] - 1) * this->dilation[a] + 1;
}

std::vector<int64_t> ConvGeometry::grid(const Axes& counts, const Axes& steps) const {
  std::vector<int64_t> pixels;
  pixels.reserve(product(counts));
  for (int64_t a = 0; a < counts[0]; ++a)
    for (int64_t b = 0; b < counts[1]; ++b)
      for (int64_t c = 0; c < counts[2]; ++c)
        pixels.push_back((a * steps[0] * frame[1] + b * steps[1]) * frame[2] + c * steps[2]);
  return pixels;
}

std::vector<int64_t> sizes_of(const Tensor& tensor) {
  std::vector<int64_t> sizes;
  for (int64_t d = 2; d < tensor.dim(); ++d) sizes.push_back(tensor.size(d));
  return sizes;
}

Axes steps_of(const Tensor& tensor) { return last_axes(tensor.strides(), 2, 0); }

std::vector<Pixel> pixels_of(const Tensor& tensor, const Axes& size, const Axes& padding, const Axes& frame) {
  const Axes stride = steps_of(tensor);
  std::vector<Pixel> pixels;
  pixels.reserve(product(size));
  for (int64_t a = 0; a < size[0]; ++a)
    for (int64_t b = 0; b < size[1]; ++b)
      for (int64_t c = 0; c < size[2]; ++c) {
        const Axes at{a + padding[0], b + padding[1], c + padding[2]};
        bool inside = true;
        for (int i = 0; i < 3; ++i) inside = inside && at[i] >= 0 && at[i] < frame[i];
        const int64_t pixel = (at[0] * frame[1] + at[1]) * frame[2] + at[2];
        pixels.push_back({a * stride[0] + b * stride[1] + c * stride[2], inside ? pixel : -1, 1, 1});
      }
  for (std::size_t i = pixels.size(); i-- > 1;) {
    Pixel &pixel = pixels[i - 1], &next = pixels[i];
    if (next.from != pixel.from + 1) continue;
    pixel.run = next.run + 1;
    if (pixel.to >= 0 && next.to == pixel.to + 1) pixel.line = next.line + 1;
  }
  return pixels;
}

std::vector<int64_t> holes_of(const std::vector<Pixel>& pixels, const Axes& frame) {
  std::vector<bool> covered(product(frame));
  for (const Pixel& pixel : pixels)
    if (pixel.to >= 0) covered[pixel.to] = true;
  std::vector<int64_t> holes;
  for (std::size_t pixel = 0; pixel < covered.size(); ++pixel)
    if (!covered[pixel]) holes.push_back(static_cast<int64_t>(pixel));
  return holes;
}

}  // namespace fisherfast
