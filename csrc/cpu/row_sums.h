// SPDX-License-Identifier: Apache-2.0
// Compiled once per instruction set by each_isa.h, as a part of the kernels of scale_sq_ and embedding_sq_. All sums are in
// fp64: memory is the limit, not arithmetic.

template <bool kHasX, class S>
double product_at(const S* g, const S* x, int64_t g_index, int64_t x_index) {
  const double factor = widen(g[g_index]);
  if constexpr (kHasX) return factor * static_cast<double>(widen(x[x_index]));
  return factor;
}

// Neighbouring columns: some rows together, so that the sums are read and written less often.
template <bool kHasX, class S, class Row>
void sum_dense_rows(double* sums, int64_t count, int64_t width, Row row) {
  int64_t k = 0;
  for (; k + 4 <= count; k += 4) {
    const auto [g0, x0] = row(k);
    const auto [g1, x1] = row(k + 1);
    const auto [g2, x2] = row(k + 2);
    const auto [g3, x3] = row(k + 3);
    for (int64_t d = 0; d < width; ++d)
      sums[d] += (product_at<kHasX>(g0, x0, d, d) + product_at<kHasX>(g1, x1, d, d)) +
                 (product_at<kHasX>(g2, x2, d, d) + product_at<kHasX>(g3, x3, d, d));
  }
  for (; k < count; ++k) {
    const auto [g, x] = row(k);
    for (int64_t d = 0; d < width; ++d) sums[d] += product_at<kHasX>(g, x, d, d);
  }
}

// sums[d] = sum_{k < count} g_k[d] x_k[d], of the rows (g_k, x_k) = row(k).
template <bool kHasX, class S, class Row>
void sum_rows(double* sums, int64_t count, int64_t width, int64_t g_stride, int64_t x_stride, Row row) {
  constexpr int64_t kRows = 32;  // columns far apart usually have rows close together: 32 of them share cache lines
  for (int64_t d = 0; d < width; ++d) sums[d] = 0;
  if (g_stride == 1 && (!kHasX || x_stride == 1)) return sum_dense_rows<kHasX, S>(sums, count, width, row);
  for (int64_t first = 0; first < count; first += kRows)
    for (int64_t d = 0; d < width; ++d)
      for (int64_t k = first; k < std::min(first + kRows, count); ++k) {
        const auto [g, x] = row(k);
        sums[d] += product_at<kHasX>(g, x, d * g_stride, d * x_stride);
      }
}

// The sum of g x over neighbouring elements: many partial sums, so that no addition waits for the one before.
template <bool kHasX, class S>
double sum_line(const S* g, const S* x, int64_t count) {
  constexpr int64_t kParts = 16;
  double parts[kParts]{};
  int64_t k = 0;
  for (; k + kParts <= count; k += kParts)
    for (int64_t part = 0; part < kParts; ++part) parts[part] += product_at<kHasX>(g, x, k + part, k + part);
  double sum = 0;
  for (; k < count; ++k) sum += product_at<kHasX>(g, x, k, k);
  for (const double part : parts) sum += part;
  return sum;
}

// The sum of the squares of count of the values from d on.
struct SquareOf {
  const double* values;

  double operator()(int64_t d, int64_t count) const { return sum_line<true>(values + d, values + d, count); }
};
