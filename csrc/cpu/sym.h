// SPDX-License-Identifier: Apache-2.0
// Symmetric products: the upper triangle of sum_q left[q, i] right[q + shift, j], for several shifts of the pixels q and
// several sets of them. Planned by the ops, done tile by tile in sym_kernel.h.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/conv_images.h"
#include "cpu/cpu.h"

namespace fisherfast {

// Pixels whose products are added up in one chain: few, for the sake of the last digits.
constexpr int64_t kShortChain = 8, kLongChain = 128;

// Pixels first, first + step, ...
struct Run {
  int64_t first, count;
};

// A set of pixels whose sum goes to several places.
struct Region {
  std::vector<Run> runs;
  std::vector<int64_t> chains;   // runs [chains[i], chains[i + 1]) are added up in one chain
  std::vector<int64_t> targets;  // of the shift
};

// The part of the result to which channel c of the rows and c' of the columns add at (c K + row, c' K + column).
struct Target {
  int64_t row, column;
};

struct Shift {
  int64_t pixels;
  std::vector<Target> targets;
  std::vector<Region> regions;

  bool diagonal() const { return targets[0].row == targets[0].column; }
};

// Channels lie in panels, [group, panel, pixel, channel]; the last ones of a panel may be zeros.
template <class R>
struct SymProblem {
  const R *left, *right;  // right, or right times the weight of the image
  const R* ones;          // as many as a block has rows, or null: no bias
  int64_t pixels, step;   // of a panel; from a pixel of a run to the next
  int64_t groups, channels, panels, width;
  int64_t K, size;  // the result is [groups, size, size], size = channels K + bias
  const std::vector<Shift>* shifts;
  Sink acc;
  double scale;
};

// The code for the instruction set in use, and the sizes of its register block. A panel's width is a multiple of both rows
// and lanes, and at most a block's width.
template <class S>
struct SymKernel {
  using R = compute_t<S>;
  int64_t rows, lanes, vectors;
  void (*tile)(const SymProblem<R>&, int64_t group, int64_t row, int64_t panel);  // row: from a multiple of rows on, or the bias
  void (*bring)(const Images<S>&, int64_t n, int64_t channel, int64_t count, R* out, int64_t pixel_stride);  // lanes of them
  void (*weigh)(const R* in, R* out, int64_t count, R weight);
};

// How many vectors wide the panels are for so many channels: as equal as can be.
inline int64_t panel_vectors(int64_t channels, int64_t rows, int64_t lanes, int64_t vectors) {
  const auto up = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const int64_t all = up(channels, lanes), panels = up(all, vectors);
  return std::max(up(all, panels), up(rows, lanes));
}

}  // namespace fisherfast
