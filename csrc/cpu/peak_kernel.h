// SPDX-License-Identifier: Apache-2.0
// Compiled once per instruction set by each_isa.h.

// Runs independent multiply-adds, as many at once as the matrix kernel keeps; returns their number of FLOPs.
[[gnu::noinline]] inline double multiply_adds(int64_t steps) {
  typedef float Vector __attribute__((vector_size(kVectorBytes)));
  constexpr int kCount = kBlockRows * kBlockVectors;
  Vector sums[kCount];
  const Vector a = Vector{} + 0.999f, b = Vector{} + 1e-3f;
#pragma GCC unroll 32
  for (int i = 0; i < kCount; ++i) sums[i] = Vector{} + static_cast<float>(i);
  for (int64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 32
    for (int i = 0; i < kCount; ++i) sums[i] = sums[i] * a + b;
  }
  Vector all = sums[0];
#pragma GCC unroll 32
  for (int i = 1; i < kCount; ++i) all += sums[i];
  volatile float keep = all[0];
  static_cast<void>(keep);
  return 2.0 * kCount * (kVectorBytes / sizeof(float)) * static_cast<double>(steps);
}
