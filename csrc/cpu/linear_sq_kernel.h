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
      for (int64_t c = 0; c < columns; ++c) line[c] = static_cast<A>(line[c] + factor * static_cast<Wide>(cells[c]));
      std::memset(cells, 0, Lanes<R>::columns * sizeof(R));
    }
  }
};

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

  // Multiplies a block of rows; the last one before a flush takes every cell to the accumulators while it is at hand.
  void multiply(const Block& block, bool flush) const {
    const Panels<R> g_panels = g.bring(block), x_panels = x.bring(block);
    int64_t cell = 0;
    for (int64_t q = 0; q < x.panels(); ++q)
      for (int64_t p = 0; p < g.panels(); ++p, cell += kCells) {
        const Target<R> to{at(target.squares, cell), at(target.sums, cell), at(target.carry, cell), target.norms};
        const int64_t row = p * kBlockRows, column = q * Lanes<R>::columns;
        const auto prefetch = [](const auto& window, double) { window.prefetch(); };
        if (flush) {
          visit(problem.squares, row, column, prefetch);
          visit(problem.sums, row, column, prefetch);
        }
        multiply(g_panels[p], x_panels[q], block, to);
        if (flush) {
          visit(problem.squares, row, column, [&](const auto& window, double scale) { window.add(reinterpret_cast<R*>(to.squares), scale); });
          visit(problem.sums, row, column, [&](const auto& window, double scale) { window.add(reinterpret_cast<R*>(to.sums), scale); });
        }
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

  // body(window, scale) with the part of an accumulator that starts at a row and a column of the tile.
  template <class Body>
  void visit(const LinearOutput& output, int64_t row, int64_t column, const Body& body) const {
    if (!output.sink) return;
    const int64_t I = problem.x.width, offset = (o + row) * I + i + column;
    const int64_t rows = std::min<int64_t>(kBlockRows, g.end - o - row), columns = std::min(Lanes<R>::columns, x.end - i - column);
    if (output.sink.is_double) {
      body(Window<double>{static_cast<double*>(output.sink.data) + offset, I, rows, columns}, output.scale);
    } else {
      body(Window<float>{static_cast<float*>(output.sink.data) + offset, I, rows, columns}, output.scale);
    }
  }
};

template <class S>
void linear_tile(const LinearProblem<S>& problem, int64_t index) {
  Tile<S> tile{problem, index};
  tile.allocate();
  Cursor cursor{problem.samples};
  Block block;
  for (int64_t blocks = 1; !cursor.done(); ++blocks) {
    cursor.next(block);
    tile.multiply(block, blocks % problem.flush_every == 0 || cursor.done());
  }
}

template <class S>
LinearKernel<S> linear_kernel() {
  return {kBlockRows, Lanes<compute_t<S>>::columns, &linear_tile<S>};
}
