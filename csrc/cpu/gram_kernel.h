// SPDX-License-Identifier: Apache-2.0
// Compiled once per instruction set by each_isa.h: the tiles of gram_.
#include "cpu/tile_kernel.h"

#include "cpu/matrix_place_kernel.h"
#include "cpu/operand_kernel.h"

// Columns of x, and behind them that of ones, if it is in [begin, end). Rows are counted through all samples of x.
template <class S, int64_t kWidth>
struct Columns : Operand<S, kWidth> {
  using R = compute_t<S>;
  using Base = Operand<S, kWidth>;
  const Samples& pieces;
  int64_t all;  // columns with that of ones

  Columns(const GramProblem<S>& problem, const Samples& pieces, int64_t begin, int64_t end, const float* row_weight)
      : Base{problem.x, problem.layout, begin, std::min(end, problem.x.width), false, row_weight}, pieces(pieces), all(end - begin) {}

  int64_t size() const { return all; }
  int64_t panels() const { return (all + kWidth - 1) / kWidth; }
  int64_t packed_size() const { return panels() * panel_size<R>(kWidth); }

  void bring(const Block& block) const {
    const Segment& rows = block.segments[0];
    const int64_t first = pieces.begin(rows.n), T = this->samples.T;
    for (int64_t done = 0; done < rows.rows;) {
      const int64_t n = (first + done) / T, t = (first + done) % T, count = std::min(rows.rows - done, T - t);
      this->pack({n, t, done, count});
      done += count;
    }
    if (all > Base::size()) add_ones(first, rows.rows);
  }

  void add_ones(int64_t first, int64_t rows) const {
    const int64_t column = all - 1, panel = column / kWidth, place = column % kWidth;
    R* out = this->packed + panel * panel_size<R>(kWidth);
    for (int64_t t = 0; t < rows; ++t, out += kWidth) {
      if (place == 0) std::memset(out, 0, kWidth * sizeof(R));  // a panel in which x has no column
      out[place] = this->row_weight ? this->row_weight[first + t] : R(1);
    }
  }
};

template <class S>
void gram_tile(const GramProblem<S>& problem, int64_t index) {
  using R = compute_t<S>;
  using Left = Columns<S, kBlockRows>;
  using Right = Columns<S, Lanes<R>::columns>;
  const Tiling& tiling = problem.tiling;
  const int64_t D = problem.D, share = index / tiling.down, pieces = ceil_div(problem.samples.N, tiling.groups);
  Tiles work = problem;
  work.samples.offsets += share * pieces;
  work.samples.N = std::min(pieces, problem.samples.N - share * pieces);
  if (problem.partials) work.sums.sink.data = problem.partials + share * D * D;
  const TilePosition tile(index % tiling.down, problem.side);
  const int64_t i = tile.row * tiling.rows, j = tile.column * tiling.columns;
  const Left left(problem, work.samples, i, std::min(i + tiling.rows, D), problem.row_weight);
  const Right right(problem, work.samples, j, std::min(j + tiling.columns, D), nullptr);
  Tile<R, Left, Right, MatrixPlace>{work, left, right, {i * D + j, D, i - j}}.run(index);
}

template <class S>
TileKernel<GramProblem<S>> gram_kernel() {
  using R = compute_t<S>;
  return {kBlockRows, Lanes<R>::columns, Lanes<R>::count, &gram_tile<S>};
}
