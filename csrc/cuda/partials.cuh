// SPDX-License-Identifier: Apache-2.0
// What blocks leave for each other's sums to be added to outputs, in a fixed order.
#pragma once

#include "cuda/device.cuh"

namespace fisherfast {

// output[e] += scale * sum_s partial[s * stride + e] for e < count, s rising; nothing while *flag is set.
template <typename Real>
struct Partials {
  const Real* data;
  int64_t stride, count;
  int splits;
  double scale;
  Output output;
  const int32_t* flag;
  int64_t side = 0;  // of a square whose elements below the diagonal are left out, or 0
};

// sqnorm[n] += the sum of its partial sums: partial[begin(n) : begin(n + 1)] with begin(n) = width * (offsets ? offsets[n] : n).
struct NormPartials {
  const double* data;
  const int64_t* offsets;
  int64_t width, N;
  Output sqnorm;
  const int32_t* flag;
};

}  // namespace fisherfast
