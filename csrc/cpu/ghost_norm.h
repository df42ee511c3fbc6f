// SPDX-License-Identifier: Apache-2.0
// The work of ghost_norm_ on the CPU, as its kernel sees it: ghost_norm.cpp plans it, ghost_norm_kernel.h adds up pairs.
#pragma once

#include <cstdint>
#include <vector>

namespace fisherfast {

// Positions first, first + 1, ..., which meet pixels of x from pixel on, some steps apart.
struct PositionLine {
  int64_t first, count, pixel;
};

// The positions at which one offset of the kernel meets a pixel inside the image.
template <class R>
struct Meetings {
  std::vector<PositionLine> lines;
  int64_t step;         // from one pixel of a line to the next
  std::vector<R> mask;  // 1 where a position of the only line does meet one, else 0, zeros behind it; or empty: all do
};

// Over pairs of positions (p, q): the sum of the products of two Gram matrices, and of their magnitudes.
struct PairSums {
  double sum = 0, size = 0;

  void operator+=(const PairSums& other) {
    sum += other.sum;
    size += other.size;
  }
};

constexpr int64_t kReadBeyond = 64;  // elements behind a Gram matrix that may be read, though they count for nothing

}  // namespace fisherfast
