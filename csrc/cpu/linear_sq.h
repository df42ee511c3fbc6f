// SPDX-License-Identifier: Apache-2.0
// The work of linear_sq_ on the CPU, as its kernels see it: linear_sq.cpp plans it, linear_sq_kernel.h does one tile.
#pragma once

#include "cpu/tile.h"

namespace fisherfast {

// The gradient of sample n is C = g_n^T x_n.
template <class S>
struct LinearProblem : Tiles {
  Rows<S> g, x;
  // Where T = 1, g and x may be squared before they are multiplied, and g may be weighted by row.
  bool squared = false;
  const float* row_weight = nullptr;
};

}  // namespace fisherfast
