// SPDX-License-Identifier: Apache-2.0
// The float32 matrix product of the BLAS that torch is linked with, for processors where it is faster than our tiles.
#pragma once

#include <cstdint>

namespace fisherfast {

// On Intel processors with AVX-512: torch brings MKL, which is at its best there. On AMD's MKL takes a slower path for AVX2
// whose sums depend on the number of threads, and the tiles are faster.
bool uses_blas();

// Rows so many elements apart.
struct BlasRows {
  const float* data;
  int64_t stride;
};

// out[o,i] = keep * out[o,i] + sum_n g[n,o] x[n,i] over n < N, o < O, i < I. Inside parallel_for it stays in its thread.
void multiply(int64_t N, int64_t O, int64_t I, BlasRows g, BlasRows x, bool keep, float* out);

}  // namespace fisherfast
