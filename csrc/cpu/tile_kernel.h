// SPDX-License-Identifier: Apache-2.0
// Compiled once per instruction set by each_isa.h, as a part of linear_sq_kernel.h and conv_sq_kernel.h: one tile of an
// accumulator, from packing to the final addition.
//
// A tile is kept in fp32 (fp64 for double inputs) as cells: blocks of kBlockRows x kBlockVectors vectors. Edges need no code
// of their own: operands are padded with zeros when they are packed, and what lies outside is not written back.
#include "cpu/tile_micro.h"

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

// G and X bring the operands, panels of them for every block of rows; Place knows where in an accumulator a cell block lies.
template <class R, class G, class X, class Place>
struct Tile {
  using Vector = typename Lanes<R>::Vector;
  const Tiles& work;
  G g;
  X x;
  Place place;
  Target<R> target{};

  int64_t cells() const { return g.panels() * x.panels() * kCells; }

  void allocate(int64_t index) {
    const int64_t sizes[] = {work.squares.sink ? cells() : 0, work.sums.sink ? cells() : 0, work.longest > kDepth ? cells() : 0};
    const int64_t g_size = g.packed_stride() * kDepth, x_size = x.packed_stride() * kDepth;
    const int64_t vectors = sizes[0] + sizes[1] + sizes[2];
    auto* memory = static_cast<Vector*>(scratch((vectors + 1) * sizeof(Vector) + (g_size + x_size) * sizeof(R)));
    std::memset(static_cast<void*>(memory), 0, vectors * sizeof(Vector));
    if (sizes[0]) target.squares = memory;
    if (sizes[1]) target.sums = memory + sizes[0];
    if (sizes[2]) target.carry = memory + sizes[0] + sizes[1];
    g.packed = reinterpret_cast<R*>(memory + vectors);
    x.packed = g.packed + g_size;  // last, and a vector to spare: rows may be copied in whole vectors
    if (work.norms) target.norms = work.norms + index * work.samples.N;
  }

  void run(int64_t index) {
    allocate(index);
    Cursor cursor{work.samples};
    Block block;
    for (int64_t blocks = 1; !cursor.done(); ++blocks) {
      cursor.next(block);
      multiply(block, blocks % work.flush_every == 0 || cursor.done());
    }
  }

  // Multiplies a block of rows; the last one before a flush takes every cell to the accumulators while it is at hand.
  void multiply(const Block& block, bool flush) const {
    const Panels<R> g_panels = g.bring(block), x_panels = x.bring(block);
    int64_t cell = 0;
    for (int64_t q = 0; q < x.panels(); ++q)
      for (int64_t p = 0; p < g.panels(); ++p, cell += kCells) {
        const Target<R> to{at(target.squares, cell), at(target.sums, cell), at(target.carry, cell), target.norms};
        const int64_t row = p * kBlockRows, column = q * Lanes<R>::columns;
        const auto prefetch = [](const auto& at, double) { at.prefetch(); };
        if (flush) {
          visit(work.squares, row, column, prefetch);
          visit(work.sums, row, column, prefetch);
        }
        multiply(g_panels[p], x_panels[q], block, to);
        if (flush) {
          visit(work.squares, row, column, [&](const auto& at, double scale) { at.add(reinterpret_cast<R*>(to.squares), scale); });
          visit(work.sums, row, column, [&](const auto& at, double scale) { at.add(reinterpret_cast<R*>(to.sums), scale); });
        }
      }
  }

  // Where a block holds many samples, they are first added up among themselves.
  void multiply(const Matrix<R>& g_panel, const Matrix<R>& x_panel, const Block& block, const Target<R>& to) const {
    constexpr int kDirect = 4;
    if (block.count <= kDirect) return micro_kernel(g_panel, x_panel, block, work.weight, to);
    Vector squares[kCells]{}, sums[kCells]{};
    micro_kernel(g_panel, x_panel, block, work.weight, {to.squares ? squares : nullptr, to.sums ? sums : nullptr, to.carry, to.norms});
    for (int k = 0; k < kCells && to.squares; ++k) to.squares[k] += squares[k];
    for (int k = 0; k < kCells && to.sums; ++k) to.sums[k] += sums[k];
  }

  static Vector* at(Vector* cells, int64_t cell) { return cells ? cells + cell : nullptr; }

  // body(window, scale) with the part of an accumulator that starts at a row and a column of the tile.
  template <class Body>
  void visit(const Output& output, int64_t row, int64_t column, const Body& body) const {
    if (!output.sink) return;
    const int64_t rows = std::min<int64_t>(kBlockRows, g.size() - row), columns = std::min(Lanes<R>::columns, x.size() - column);
    if (output.sink.is_double) {
      body(place.window(static_cast<double*>(output.sink.data), row, column, rows, columns), output.scale);
    } else {
      body(place.window(static_cast<float*>(output.sink.data), row, column, rows, columns), output.scale);
    }
  }
};
