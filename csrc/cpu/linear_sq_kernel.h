// SPDX-License-Identifier: Apache-2.0
// Compiled once per instruction set by each_isa.h: one tile of acc, from packing to the final addition.
//
// A tile is kept in fp32 (fp64 for double inputs) as cells: blocks of kBlockRows x kBlockVectors vectors. Edges need no code
// of their own: operands are padded with zeros when they are packed, and what lies outside is not written back.
#include "cpu/linear_sq_micro.h"

// Panels of an operand: the first ones where they are, the others packed.
template <class R>
struct Panels {
  Matrix<R> in_place, packed;
  int64_t whole, width;  // number of those in place; columns of each

  Matrix<R> operator[](int64_t index) const {
    const Matrix<R>& matrix = index < whole ? in_place : packed;
    return {matrix.data + index * width, matrix.stride};
  }
};

// Columns [begin, end) of an operand, brought to panels of kWidth columns.
template <class S, int64_t kWidth>
struct Operand {
  using R = compute_t<S>;
  const Rows<S>& rows;
  const Samples& samples;
  int64_t begin, end;
  bool squared;
  const float* row_weight;  // or null
  R* packed = nullptr;

  int64_t panels() const { return (end - begin + kWidth - 1) / kWidth; }

  // An odd number of cache lines, so that rows do not compete for the same places in the cache.
  int64_t packed_stride() const {
    constexpr int64_t kLine = 64 / sizeof(R);
    return ((panels() * kWidth + kLine - 1) / kLine | 1) * kLine;
  }

  const S* row(const Segment& segment) const {
    return rows.sample(samples, segment.n) + segment.t * rows.stride_t + begin * rows.stride_d;
  }

  // Long strides hurt only where fewer registers mean that a panel is read more often.
  Panels<R> bring(const Block& block) const {
    Panels<R> panels{{}, {packed, packed_stride()}, 0, kWidth};
    if constexpr (std::is_same_v<S, R> && kVectorBytes >= 64) {
      if (rows.stride_d == 1 && !squared && !row_weight && (block.count == 1 || rows.even(samples))) {
        panels.in_place = {row(block.segments[0]), rows.stride_t};
        panels.whole = (end - begin) / kWidth;
      }
    }
    const int64_t first = panels.whole * kWidth;
    if (begin + first < end) {
      for (int s = 0; s < block.count; ++s) pack(block.segments[s], first);
    }
    return panels;
  }

  void pack(const Segment& segment, int64_t first) const {
    const S* in = row(segment) + first * rows.stride_d;
    R* out = packed + segment.row * packed_stride();
    for (int64_t t = 0; t < segment.rows; ++t, in += rows.stride_t, out += packed_stride()) {
      const R w = row_weight ? row_weight[samples.begin(segment.n) + segment.t + t] : R(1);
      if (rows.stride_d == 1) {
        pack_row(in, std::integral_constant<int64_t, 1>(), w, first, out);
      } else {
        pack_row(in, rows.stride_d, w, first, out);
      }
    }
  }

  template <class Stride>
  void pack_row(const S* in, Stride stride, R w, int64_t first, R* out) const {
    if (squared) {
      for (int64_t c = first; c < end - begin; ++c, in += stride) out[c] = widen(*in) * widen(*in) * w;
    } else {
      for (int64_t c = first; c < end - begin; ++c, in += stride) out[c] = widen(*in) * w;
    }
    for (int64_t c = end - begin; c < panels() * kWidth; ++c) out[c] = 0;
  }
};

// Adds the cells of a tile to rows of an accumulator, which are walked from end to end, and clears them.
template <class A, class R>
void flush(R* cells, A* out, int64_t stride, int64_t rows, int64_t columns, double scale) {
  using Wide = std::common_type_t<A, R>;
  constexpr int64_t kColumns = Lanes<R>::columns;
  const int64_t panel = (rows + kBlockRows - 1) / kBlockRows * kBlockRows * kColumns;
  const Wide factor = static_cast<Wide>(scale);
  for (int64_t row = 0; row < rows; ++row, out += stride)
    for (int64_t column = 0; column < columns; column += kColumns) {
      R* cell = cells + column / kColumns * panel + row * kColumns;
      const int64_t width = std::min(kColumns, columns - column);
      for (int64_t c = 0; c < width; ++c) out[column + c] = static_cast<A>(out[column + c] + factor * static_cast<Wide>(cell[c]));
      std::memset(cell, 0, kColumns * sizeof(R));
    }
}

template <class S>
struct Tile {
  using R = compute_t<S>;
  using Vector = typename Lanes<R>::Vector;
  const LinearProblem<S>& problem;
  int64_t index;
  int64_t o = index / problem.tiling.across * problem.tiling.rows;
  int64_t i = index % problem.tiling.across * problem.tiling.columns;
  Operand<S, kBlockRows> g{problem.g, problem.samples, o, std::min(o + problem.tiling.rows, problem.g.width),
                           problem.squared, problem.row_weight};
  Operand<S, Lanes<R>::columns> x{problem.x, problem.samples, i, std::min(i + problem.tiling.columns, problem.x.width),
                                  problem.squared, nullptr};
  Target<R> target{};

  int64_t cells() const { return g.panels() * x.panels() * kCells; }

  void allocate() {
    const int64_t sizes[] = {problem.squares.sink ? cells() : 0, problem.sums.sink ? cells() : 0,
                             problem.longest > kDepth ? cells() : 0};
    const int64_t g_size = g.packed_stride() * kDepth, x_size = x.packed_stride() * kDepth;
    const int64_t vectors = sizes[0] + sizes[1] + sizes[2];
    auto* memory = static_cast<Vector*>(scratch(vectors * sizeof(Vector) + (g_size + x_size) * sizeof(R)));
    std::memset(static_cast<void*>(memory), 0, vectors * sizeof(Vector));
    if (sizes[0]) target.squares = memory;
    if (sizes[1]) target.sums = memory + sizes[0];
    if (sizes[2]) target.carry = memory + sizes[0] + sizes[1];
    x.packed = reinterpret_cast<R*>(memory + vectors);
    g.packed = x.packed + x_size;
    if (problem.norms) target.norms = problem.norms + index * problem.samples.N;
  }

  void multiply(const Block& block) const {
    const Panels<R> g_panels = g.bring(block), x_panels = x.bring(block);
    int64_t cell = 0;
    for (int64_t q = 0; q < x.panels(); ++q) {
      for (int64_t p = 0; p < g.panels(); ++p, cell += kCells)
        multiply(g_panels[p], x_panels[q], block,
                 {at(target.squares, cell), at(target.sums, cell), at(target.carry, cell), target.norms});
    }
  }

  // Where a block holds many samples, they are first added up among themselves.
  void multiply(const Matrix<R>& g_panel, const Matrix<R>& x_panel, const Block& block, const Target<R>& to) const {
    constexpr int kDirect = 4;
    if (block.count <= kDirect) return micro_kernel(g_panel, x_panel, block, problem.weight, to);
    Vector squares[kCells]{}, sums[kCells]{};
    micro_kernel(g_panel, x_panel, block, problem.weight, {to.squares ? squares : nullptr, to.sums ? sums : nullptr, to.carry, to.norms});
    for (int k = 0; k < kCells && to.squares; ++k) to.squares[k] += squares[k];
    for (int k = 0; k < kCells && to.sums; ++k) to.sums[k] += sums[k];
  }

  static Vector* at(Vector* cells, int64_t cell) { return cells ? cells + cell : nullptr; }

  void flush_to(Vector* cells, const LinearOutput& output) const {
    if (!cells) return;
    const int64_t I = problem.x.width, offset = o * I + i;
    const int64_t rows = g.end - o, columns = x.end - i;
    auto* values = reinterpret_cast<R*>(cells);
    if (output.sink.is_double) {
      flush(values, static_cast<double*>(output.sink.data) + offset, I, rows, columns, output.scale);
    } else {
      flush(values, static_cast<float*>(output.sink.data) + offset, I, rows, columns, output.scale);
    }
  }

  void flush_all() const {
    flush_to(target.squares, problem.squares);
    flush_to(target.sums, problem.sums);
  }
};

template <class S>
void linear_tile(const LinearProblem<S>& problem, int64_t index) {
  Tile<S> tile{problem, index};
  tile.allocate();
  Cursor cursor;
  Block block;
  for (int64_t blocks = 1; cursor.next(problem.samples, block); ++blocks) {
    tile.multiply(block);
    if (blocks % problem.flush_every == 0) tile.flush_all();
  }
  tile.flush_all();
}

template <class S>
LinearKernel<S> linear_kernel() {
  return {kBlockRows, Lanes<compute_t<S>>::columns, &linear_tile<S>};
}
