// SPDX-License-Identifier: Apache-2.0
// A tensor of any strides as lines: pieces of memory with one step between elements, for ops that do not care about their order.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/cpu.h"

namespace fisherfast {

enum class Repeated { once, counted };  // elements that an expanded tensor names several times

class Lines {
 public:
  Lines(const Tensor& tensor, Repeated repeated) : axes_(axes_of(tensor, repeated)), line_(axes_.back()) {
    axes_.pop_back();
    size_ = line_.size;
    for (const Axis& axis : axes_) size_ *= axis.size;
  }

  int64_t size() const { return size_; }

  // body(offset, count, stride) for the pieces that hold elements [begin, end), 0 <= begin <= end <= size().
  template <class Body>
  void visit(int64_t begin, int64_t end, const Body& body) const {
    while (begin < end) {
      const int64_t start = begin % line_.size, count = std::min(end - begin, line_.size - start);
      int64_t offset = start * line_.stride, rest = begin / line_.size;
      for (auto axis = axes_.rbegin(); axis != axes_.rend(); rest /= axis->size, ++axis)
        offset += rest % axis->size * axis->stride;
      body(offset, count, line_.stride);
      begin += count;
    }
  }

 private:
  struct Axis {
    int64_t size, stride;
  };

  // The longest stride first; those that memory allows are one.
  static std::vector<Axis> axes_of(const Tensor& tensor, Repeated repeated) {
    std::vector<Axis> axes;
    for (int64_t d = 0; d < tensor.dim(); ++d)
      if (tensor.size(d) != 1 && (tensor.stride(d) > 0 || repeated == Repeated::counted))
        axes.push_back({tensor.size(d), tensor.stride(d)});
    std::stable_sort(axes.begin(), axes.end(), [](const Axis& a, const Axis& b) { return a.stride > b.stride; });
    std::vector<Axis> merged;
    for (const Axis& axis : axes) {
      if (!merged.empty() && merged.back().stride == axis.size * axis.stride) {
        merged.back() = {merged.back().size * axis.size, axis.stride};
      } else {
        merged.push_back(axis);
      }
    }
    if (merged.empty()) merged.push_back({1, 1});
    return merged;
  }

  std::vector<Axis> axes_;
  Axis line_;
  int64_t size_;
};

}  // namespace fisherfast
