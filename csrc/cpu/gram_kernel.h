// SPDX-License-Identifier: Apache-2.0
// Compiled once per instruction set by each_isa.h: the tiles of gram_.
#include "cpu/tile_kernel.h"

#include "cpu/matrix_place_kernel.h"
#include "cpu/operand_kernel.h"

// Panels are as wide as the register block where that holds whole numbers of its rows: then they serve as either operand.
template <class R, int64_t kRead>
constexpr int64_t kPanel = Lanes<R>::columns % kRead == 0 ? Lanes<R>::columns : kRead;

// Columns of x, and behind them that of ones, if it is in [begin, end); read kRead at a time. Rows are counted through all
// samples of x.
template <class S, int64_t kRead>
struct Columns : Operand<S, kPanel<compute_t<S>, kRead>> {
  using R = compute_t<S>;
  static constexpr int64_t kWidth = kPanel<R, kRead>;
  using Base = Operand<S, kWidth>;
  const Samples& pieces;
  int64_t all;                 // columns with that of ones
  R* const* lender = nullptr;  // another operand's panels, which are the same

  Columns(const GramProblem<S>& problem, const Samples& pieces, int64_t begin, int64_t end, const float* row_weight)
      : Base{problem.x, problem.layout, begin, std::min(end, problem.x.width), false, row_weight},
        pieces(pieces),
        all(end - begin) {}

  int64_t size() const { return all; }
  int64_t panels() const { return (all + kRead - 1) / kRead; }
  int64_t packed_panels() const { return ceil_div(all, kWidth); }
  int64_t packed_size() const { return lender ? 0 : (kPacksAhead ? packed_panels() : 1) * panel_size<R>(kWidth); }

  Matrix<R> panel(const Block& block, int64_t index) const {
    const int64_t column = index * kRead, panel = column / kWidth;
    if (!kPacksAhead) pack(block, panel, panel + 1);
    if (lender) return {*lender + panel * panel_size<R>(kWidth) + column % kWidth, kWidth};
    return {this->place(panel) + column % kWidth, kWidth};
  }

  // The same where it lies, see Operand.
  Matrix<S> source(const Block& block, int64_t index) const {
    const Segment& piece = block.segments[0];
    const int64_t first = pieces.begin(piece.n) + piece.t, T = this->samples.T;
    const bool one = first / T == (first + piece.rows - 1) / T;  // sample of x
    Block rows{piece.rows, 1, false, false, {{first / T, first % T, 0, piece.rows}}};
    return one || this->rows.even(this->samples) ? Base::source(rows, index) : Matrix<S>{};
  }

  void bring(const Block& block) const {
    if (kPacksAhead && !lender) pack(block, 0, packed_panels());
  }

  void pack(const Block& block, int64_t first, int64_t last) const {
    const Segment& rows = block.segments[0];
    const int64_t begin = pieces.begin(rows.n), T = this->samples.T, ones = (all - 1) / kWidth;
    for (int64_t done = 0; done < rows.rows;) {
      const int64_t n = (begin + done) / T, t = (begin + done) % T, count = std::min(rows.rows - done, T - t);
      Base::pack_segment({n, t, done, count}, first, std::min(last, Base::panels()));
      done += count;
    }
    if (all > Base::size() && first <= ones && ones < last) add_ones(begin, rows.rows);
  }

  void add_ones(int64_t first, int64_t rows) const {
    const int64_t column = all - 1, place = column % kWidth;
    R* out = this->place(column / kWidth);
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
  const int64_t first = std::min(share * pieces, problem.samples.N);  // the last shares may be empty
  work.samples.offsets += first;
  work.samples.N = std::min(pieces, problem.samples.N - first);
  if (problem.partials) work.sums.sink.data = problem.partials + share * D * D;
  const TilePosition tile(index % tiling.down, problem.side);
  const int64_t i = tile.row * tiling.rows, j = tile.column * tiling.columns;
  const Left left(problem, work.samples, i, std::min(i + tiling.rows, D), problem.row_weight);
  const Right right(problem, work.samples, j, std::min(j + tiling.columns, D), nullptr);
  Tile<R, Left, Right, MatrixPlace> product{work, left, right, {i * D + j, D, i - j}};
  if (kPacksAhead && i == j && !problem.row_weight && Left::kWidth == Right::kWidth) product.g.lender = &product.x.packed;
  product.run(index);
}

template <class S>
TileKernel<GramProblem<S>> gram_kernel() {
  using R = compute_t<S>;
  return {kBlockRows, Lanes<R>::columns, Lanes<R>::count, kChain, &gram_tile<S>};
}
