// SPDX-License-Identifier: Apache-2.0
// The work of gram_ on the CPU, as its kernels see it: gram.cpp plans it, gram_kernel.h does one tile.
#pragma once

#include "cpu/tile.h"

namespace fisherfast {

// The sum over rows is that of the samples of Tiles: pieces of at most kDepth rows, which know nothing of the samples of x.
// Where there are partials, pieces are shared out to groups, and each group adds to a [D, D] of its own.
//
// tiling: squares of the accumulator on and above its diagonal, `side` of them to a row.
template <class S>
struct GramProblem : Tiles {
  Rows<S> x;
  Samples layout;           // of x
  const float* row_weight;  // [M] or null
  int64_t D;                // columns, with that of ones
  int64_t side = 0;
  compute_t<S>* partials = nullptr;  // [groups, D, D]
};

// The row and column of a tile in a grid of side x side. Those on the diagonal, half the work, come last: they fill the gaps.
struct TilePosition {
  int64_t row, column;

  TilePosition(int64_t index, int64_t side) : row(index), column(1) {
    const int64_t above = side * (side - 1) / 2;
    if (index >= above) {
      row = column = index - above;
    } else {
      while (row >= column) row -= column++;
    }
  }
};

// out[i,j] += sum_m x[m,i] x[m,j] for j >= i, of M rows; out is [D, D] with D = x.width.
template <class S>
void add_gram(const Rows<S>& x, int64_t M, compute_t<S>* out, int64_t threads);

}  // namespace fisherfast
