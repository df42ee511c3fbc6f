// SPDX-License-Identifier: Apache-2.0
// Compiled once per instruction set by each_isa.h, as a part of linear_sq_kernel.h and conv_sq_kernel.h: one tile of an
// accumulator, from packing to the final addition.
//
// A tile is kept in fp32 (fp64 for double inputs) as cells: blocks of kBlockRows x kBlockVectors vectors. Edges need no code
// of their own: operands are padded with zeros when they are packed, and what lies outside is not written back.
#include "cpu/tile_micro.h"

// A packed panel of an operand, row after row. A vector to spare: rows may be copied in whole vectors, and panels do not
// compete for the same places in the cache.
template <class R>
constexpr int64_t panel_size(int64_t width) {
  return kDepth * width + Lanes<R>::count;
}

// G and X bring the operands, panels of them for every block of rows; Place says which cells there are, by their first row and
// end column, and takes them to the accumulators.
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

  int64_t cells() const { return g.panels() * x.panels() * kCells; }

  void allocate(int64_t index) {
    const int64_t sizes[] = {work.squares.sink ? cells() : 0, work.sums.sink ? cells() : 0, work.longest > kDepth ? cells() : 0};
    const int64_t g_size = g.packed_size(), x_size = x.packed_size();
    const int64_t vectors = sizes[0] + sizes[1] + sizes[2];
    auto* memory = static_cast<Vector*>(scratch(vectors * sizeof(Vector) + (g_size + x_size) * sizeof(R)));
    std::memset(static_cast<void*>(memory), 0, vectors * sizeof(Vector));
    if (sizes[0]) target.squares = memory;
    if (sizes[1]) target.sums = memory + sizes[0];
    if (sizes[2]) target.carry = memory + sizes[0] + sizes[1];
    x.packed = reinterpret_cast<R*>(memory + vectors);
    g.packed = x.packed + x_size;
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

  // Multiplies a block of rows; the last one before a flush takes every cell to the accumulators, if they allow while it is
  // at hand.
  void multiply(const Block& block, bool flush) const {
    g.bring(block);
    x.bring(block);
    int64_t cell = 0;
    for (int64_t q = 0; q < x.panels(); ++q) {
      const Matrix<R> x_panel = x.panel(block, q);
      const MicroKernel<R> micro_kernel = micro_kernel_of<R>(x.size() - q * kColumns);
      for (int64_t p = 0; p < g.panels(); ++p, cell += kCells) {
        const int64_t row = p * kBlockRows, column = q * Lanes<R>::columns;
        if (!place.holds(row, column + kColumns)) continue;
        const Target<R> to{at(target.squares, cell), at(target.sums, cell), at(target.carry, cell), target.norms};
        if (flush) place.prefetch(*this, row, column);
        multiply(micro_kernel, g.panel(block, p), x_panel, block, to);
        if (flush) place.add_cell(*this, row, column, to);
      }
    }
    if (flush) place.add_tile(*this);
  }

  // Where a block holds many samples, they are first added up among themselves.
  void multiply(MicroKernel<R> micro_kernel, const Matrix<R>& g_panel, const Matrix<R>& x_panel, const Block& block,
                const Target<R>& to) const {
    constexpr int kDirect = 1;
    if (block.count <= kDirect) return micro_kernel(g_panel, x_panel, block, work.weight, to);
    Vector squares[kCells]{}, sums[kCells]{};
    micro_kernel(g_panel, x_panel, block, work.weight, {to.squares ? squares : nullptr, to.sums ? sums : nullptr, to.carry, to.norms});
    for (int k = 0; k < kCells && to.squares; ++k) to.squares[k] += squares[k];
    for (int k = 0; k < kCells && to.sums; ++k) to.sums[k] += sums[k];
  }

  static Vector* at(Vector* cells, int64_t cell) { return cells ? cells + cell : nullptr; }
};
