// SPDX-License-Identifier: Apache-2.0
// Compiled once per instruction set by each_isa.h: the tiles of linear_sq_.
#include "cpu/tile_kernel.h"

#include "cpu/operand_kernel.h"
#include "cpu/row_sums.h"

// The part of an accumulator that a cell block belongs to: rows x columns of it are inside.
template <class A>
struct Window {
  A* out;
  int64_t stride, rows, columns;

  void prefetch() const {
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t c = 0; c < columns; c += 64 / sizeof(A)) __builtin_prefetch(out + row * stride + c, 1);
  }

  // Adds a block of cells, and clears it.
  template <class R>
  void add(R* cells, double scale) const {
    using Wide = std::common_type_t<A, R>;
    const Wide factor = static_cast<Wide>(scale);
    for (int64_t row = 0; row < rows; ++row, cells += Lanes<R>::columns) {
      A* line = out + row * stride;
      int64_t c = 0;
      if constexpr (std::is_same_v<A, R>) {  // GCC takes the loop below number by number
        using Unaligned = typename Lanes<R>::Unaligned;
        for (; c + Lanes<R>::count <= columns; c += Lanes<R>::count)
          *reinterpret_cast<Unaligned*>(line + c) += factor * *reinterpret_cast<const Unaligned*>(cells + c);
      }
      for (; c < columns; ++c) line[c] = static_cast<A>(line[c] + factor * static_cast<Wide>(cells[c]));
      std::memset(cells, 0, Lanes<R>::columns * sizeof(R));
    }
  }
};

// A tile of a matrix that starts at its element first: a cell block is taken there as soon as it is done.
struct MatrixPlace {
  int64_t first, stride;

  template <class Tile>
  void prefetch(const Tile& tile, int64_t row, int64_t column) const {
    const auto body = [](const auto& window, double) { window.prefetch(); };
    visit(tile, tile.work.squares, row, column, body);
    visit(tile, tile.work.sums, row, column, body);
  }

  template <class Tile, class R>
  void add_cell(const Tile& tile, int64_t row, int64_t column, const Target<R>& cell) const {
    visit(tile, tile.work.squares, row, column, [&](const auto& window, double scale) { window.add(reinterpret_cast<R*>(cell.squares), scale); });
    visit(tile, tile.work.sums, row, column, [&](const auto& window, double scale) { window.add(reinterpret_cast<R*>(cell.sums), scale); });
  }

  template <class Tile>
  void add_tile(const Tile&) const {}

  // body(window, scale) with the part of an accumulator that starts at a row and a column of the tile.
  template <class Tile, class Body>
  void visit(const Tile& tile, const Output& output, int64_t row, int64_t column, const Body& body) const {
    if (!output.sink) return;
    const int64_t rows = std::min<int64_t>(kBlockRows, tile.g.size() - row);
    const int64_t columns = std::min<int64_t>(Tile::kColumns, tile.x.size() - column), offset = first + row * stride + column;
    if (output.sink.is_double) {
      body(Window<double>{static_cast<double*>(output.sink.data) + offset, stride, rows, columns}, output.scale);
    } else {
      body(Window<float>{static_cast<float*>(output.sink.data) + offset, stride, rows, columns}, output.scale);
    }
  }
};

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
  Tile<R, G, X, MatrixPlace>{problem, g, x, {o * I + i, I}}.run(index);
}

template <class S>
TileKernel<LinearProblem<S>> linear_kernel() {
  using R = compute_t<S>;
  return {kBlockRows, Lanes<R>::columns, Lanes<R>::count, &linear_tile<S>};
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
