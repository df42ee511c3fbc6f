// SPDX-License-Identifier: Apache-2.0
// What blocks leave for each other's sums to be added to outputs, in a fixed order.
#pragma once

#include "cuda/device.cuh"

namespace fisherfast {

// output[r, c] += scale * sum_s partial[s * stride + r * pitch + c], in a fixed order; nothing while *flag is set.
template <typename Real>
struct Partials {
  const Real* data;
  int64_t stride, rows, columns, pitch, splits;
  double scale;
  Output output;
  const int32_t* flag;
  bool upper = false;  // only on and above the diagonal

  // Many partial sums of few elements keep too few threads busy: so many threads share the sums of an element.
  FISHERFAST_HD int groups() const { return splits < 16 ? 1 : 8; }
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
