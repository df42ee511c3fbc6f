// SPDX-License-Identifier: Apache-2.0
// Compiled once per instruction set by each_isa.h, as a part of linear_sq_kernel.h and conv_sq_kernel.h: one tile of an
// accumulator, from packing to the final addition.
//
// A tile is kept in fp32 (fp64 for double inputs) as cells: blocks of kBlockRows x kBlockVectors vectors. Edges need no code
// of their own: operands are padded with zeros when they are packed, and what lies outside is not written back.
#include "cpu/lanes.h"

#if defined(FISHERFAST_AMX)
#include "cpu/tile_amx.h"
#else
#include "cpu/tile_micro.h"
#endif

// A packed panel of an operand, row after row. A vector to spare: rows may be copied in whole vectors, and panels do not
// compete for the same places in the cache.
template <class R>
constexpr int64_t panel_size(int64_t width) {
  return kDepth * width + Lanes<R>::count;
}

// G and X bring the operands, panels of them for every block of rows; Place says which cells there are, by how many columns of
// a block lie outside, the first ones of all its rows, and takes them to the accumulators.
template <class R, class G, class X, class Place>
struct Tile {
  using Real = R;
  using Vector = typename Lanes<R>::Vector;
  static constexpr int64_t kColumns = Lanes<R>::columns;
  const Tiles& work;
  G g;
  X x;
  Place place;
  Target<R> target{};
  R* copies = nullptr;  // memory of the multiplier

  int64_t cells() const { return g.panels() * x.panels() * kCells; }

  void allocate(int64_t index) {
    const int64_t sizes[] = {work.squares.sink ? cells() : 0, work.sums.sink ? cells() : 0, work.longest > kDepth ? cells() : 0};
    const int64_t g_size = g.packed_size(), x_size = x.packed_size();
    const int64_t vectors = sizes[0] + sizes[1] + sizes[2];
    const int64_t reals = g_size + x_size + Multiplier<R, G, X>::size(g.panels());
    auto* memory = static_cast<Vector*>(scratch(vectors * sizeof(Vector) + reals * sizeof(R)));
    std::memset(static_cast<void*>(memory), 0, vectors * sizeof(Vector));
    if (sizes[0]) target.squares = memory;
    if (sizes[1]) target.sums = memory + sizes[0];
    if (sizes[2]) target.carry = memory + sizes[0] + sizes[1];
    x.packed = reinterpret_cast<R*>(memory + vectors);
    g.packed = x.packed + x_size;
    copies = g.packed + g_size;
    if (work.norms) target.norms = work.norms + index * work.samples.N;
  }

  void run(int64_t index) {
    allocate(index);
    Multiplier<R, G, X> multiplier(g, x, copies);
    Cursor cursor{work.samples};
    Block block;
    for (int64_t blocks = 1; !cursor.done(); ++blocks) {
      cursor.next(block);
      multiply(multiplier, block, blocks % work.flush_every == 0 || cursor.done());
    }
  }

  // Multiplies a block of rows; the last one before a flush takes every cell to the accumulators, if they allow while it is
  // at hand.
  void multiply(Multiplier<R, G, X>& multiplier, const Block& block, bool flush) const {
    g.bring(block);
    x.bring(block);
    multiplier.bring_left(block);
    CellBlock last{};
    int64_t cell = 0;
    for (int64_t q = 0; q < x.panels(); ++q) {
      multiplier.bring_right(block, q);
      for (int64_t p = 0; p < g.panels(); ++p, cell += kCells) {
        const int64_t row = p * kBlockRows, column = q * Lanes<R>::columns;
        const int64_t outside = place.outside(row, column);
        if (outside >= kColumns) continue;
        const Target<R> to{at(target.squares, cell), at(target.sums, cell), at(target.carry, cell), target.norms};
        if (flush) place.prefetch(*this, row, column);
        multiplier.multiply(block, p, outside, work.weight, to);
        if (!flush) continue;
        add(last);  // its results may have come only now
        last = {row, column, to};
      }
    }
    if (!flush) return;
    multiplier.finish();
    add(last);
    place.add_tile(*this);
  }

  struct CellBlock {
    int64_t row, column;
    Target<R> cells;
  };

  void add(const CellBlock& block) const {
    if (block.cells.squares || block.cells.sums) place.add_cell(*this, block.row, block.column, block.cells);
  }

  static Vector* at(Vector* cells, int64_t cell) { return cells ? cells + cell : nullptr; }
};
