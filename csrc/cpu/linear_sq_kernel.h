// SPDX-License-Identifier: Apache-2.0
// Compiled once per instruction set by each_isa.h: the tiles of linear_sq_.
#include "cpu/tile_kernel.h"

#include "cpu/matrix_place_kernel.h"
#include "cpu/operand_kernel.h"
#include "cpu/row_sums.h"

template <class S>
void linear_tile(const LinearProblem<S>& problem, int64_t index) {
  using R = compute_t<S>;
  using G = Operand<S, kBlockRows>;
  using X = Operand<S, Lanes<R>::columns>;
  const Tiling& tiling = problem.tiling;
  const int64_t O = problem.g.width, I = problem.x.width;
  const int64_t o = index / tiling.across * tiling.rows, i = index % tiling.across * tiling.columns;
  const G g{problem.g, problem.samples, o, std::min(o + tiling.rows, O), problem.squared, problem.row_weight};
  const X x{problem.x, problem.samples, i, std::min(i + tiling.columns, I), problem.squared, nullptr};
  Tile<R, G, X, MatrixPlace>{problem, g, x, {o * I + i, I, kWhole}}.run(index);
}

template <class S>
TileKernel<LinearProblem<S>> linear_kernel() {
  using R = compute_t<S>;
  return {kBlockRows, Lanes<R>::columns, Lanes<R>::count, kChain, &linear_tile<S>};
}

// The sum of the squares of row n, where a sample has no more rows.
template <class S>
double row_square(const Rows<S>& rows, int64_t n) {
  const S* row = rows.data + n * rows.stride_n;
  if (rows.stride_d == 1) return sum_line<true>(row, row, rows.width);
  double sum = 0;
  for (int64_t d = 0; d < rows.width; ++d) sum += product_at<true>(row, row, d * rows.stride_d, d * rows.stride_d);
  return sum;
}

// Row n of a factor of the product over samples where T = 1: in fp32, weighted, squared or not.
inline void factor_row(const Rows<float>& rows, int64_t n, float w, bool squared, float* out) {
  const float* row = rows.data + n * rows.stride_n;
  const auto fill = [=](auto stride) {
    if (squared) {
      for (int64_t d = 0; d < rows.width; ++d) out[d] = row[d * stride] * row[d * stride] * w;
    } else {
      for (int64_t d = 0; d < rows.width; ++d) out[d] = row[d * stride] * w;
    }
  };
  if (rows.stride_d == 1) {
    fill(std::integral_constant<int64_t, 1>());
  } else {
    fill(rows.stride_d);
  }
}

// Adds a dense matrix to a part of another, whose rows are so many elements apart.
inline void add_rows(const float* in, int64_t rows, int64_t columns, float scale, float* out, int64_t stride) {
  for (int64_t row = 0; row < rows; ++row, in += columns, out += stride)
    for (int64_t c = 0; c < columns; ++c) out[c] += scale * in[c];
}
