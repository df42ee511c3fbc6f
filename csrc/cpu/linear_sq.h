// SPDX-License-Identifier: Apache-2.0
// The work of linear_sq_ on the CPU, as its kernels see it: linear_sq.cpp plans it, linear_sq_kernel.h does one tile.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/cpu.h"

namespace fisherfast {

// An [O, I] accumulator and the factor of what is added to it.
struct LinearOutput {
  Sink sink;
  double scale;
};

// Sums are short chains of additions (kDepth positions, then kRun samples, then blocks of those), for the sake of their last
// digits: one chain over thousands of fp32 terms would lose some.
constexpr int64_t kDepth = 128;  // most rows multiplied in one go; that many of 48 columns of x stay in L1
constexpr int64_t kRun = 32;     // most samples in one go
constexpr int64_t kMaxTileRows = 256, kMaxTileColumns = 528;  // about half of a 1 MiB L2 in fp32

// [O, I] cut into down x across tiles of one size, but for the last ones.
struct Tiling {
  int64_t rows, columns, down, across;
};

// Per sample n, with C = g_n^T x_n: squares += w_n C^2, sums += w_n C, norms[n] += |C|^2.
template <class S>
struct LinearProblem {
  Rows<S> g, x;
  Samples samples;
  const float* weight;  // [N] or null
  LinearOutput squares, sums;
  double* norms;  // [tiles, N] or null: every tile has its own row
  Tiling tiling;
  int64_t longest;  // most rows of a sample
  // Where T = 1, g and x may be squared before they are multiplied, and g may be weighted by row.
  bool squared;
  const float* row_weight;
  int64_t flush_every = 32;  // blocks added up in a tile before it goes to acc
};

template <class S>
struct LinearKernel {
  int64_t block_rows, block_columns;  // of the tiles' size both must be divisors
  void (*tile)(const LinearProblem<S>&, int64_t index);
};

}  // namespace fisherfast
