// SPDX-License-Identifier: Apache-2.0
// Compiled once per instruction set by each_isa.h, as a part of the kernels of scale_sq_ and embedding_sq_.

template <bool kHasX, class S>
double product_at(const S* g, const S* x, int64_t g_index, int64_t x_index) {
  const double factor = widen(g[g_index]);
  if constexpr (kHasX) return factor * static_cast<double>(widen(x[x_index]));
  return factor;
}

// sums[d] = sum_{k < count} g_k[d] x_k[d], of the rows (g_k, x_k) = row(k). In fp64: memory is the limit, not arithmetic.
template <bool kHasX, class S, class Row>
void sum_rows(double* sums, int64_t count, int64_t width, int64_t g_stride, int64_t x_stride, Row row) {
  constexpr int64_t kRows = 32;  // columns far apart usually have rows close together: 32 of them share cache lines
  const bool dense = g_stride == 1 && (!kHasX || x_stride == 1);
  for (int64_t d = 0; d < width; ++d) sums[d] = 0;
  if (dense) {
    for (int64_t k = 0; k < count; ++k) {
      const auto [g, x] = row(k);
      for (int64_t d = 0; d < width; ++d) sums[d] += product_at<kHasX>(g, x, d, d);
    }
    return;
  }
  for (int64_t first = 0; first < count; first += kRows)
    for (int64_t d = 0; d < width; ++d)
      for (int64_t k = first; k < std::min(first + kRows, count); ++k) {
        const auto [g, x] = row(k);
        sums[d] += product_at<kHasX>(g, x, d * g_stride, d * x_stride);
      }
}
