// SPDX-License-Identifier: Apache-2.0
// Compiled once per instruction set by each_isa.h, after tile_kernel.h: where the cells of a tile go if the accumulator is a
// matrix in memory.

// The part of an accumulator that a cell block belongs to: rows x columns of it are inside, but for what lies left of the
// diagonal that passes through (r, r + diagonal).
template <class A>
struct Window {
  A* out;
  int64_t stride, rows, columns, diagonal;

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
      int64_t c = std::max<int64_t>(0, row + diagonal);
      if constexpr (std::is_same_v<A, R>) {  // GCC takes the loop below number by number
        using Unaligned = typename Lanes<R>::Unaligned;
        for (; c + Lanes<R>::count <= columns; c += Lanes<R>::count)
          *reinterpret_cast<Unaligned*>(line + c) += factor * *reinterpret_cast<const Unaligned*>(cells + c);
      }
      for (; c < columns; ++c) line[c] = static_cast<A>(line[c] + factor * static_cast<Wide>(cells[c]));
      // Not by memset: for so few bytes GCC writes rep stos, which takes longer to start than the row takes to add.
      auto* vectors = reinterpret_cast<typename Lanes<R>::Vector*>(cells);
#pragma GCC unroll 4
      for (int j = 0; j < kBlockVectors; ++j) vectors[j] = typename Lanes<R>::Vector{};
    }
  }
};

constexpr int64_t kWhole = INT64_MIN / 2;  // the diagonal of a matrix without one: everything lies right of it

// A tile of a matrix that starts at its element first: a cell block is taken there as soon as it is done. With a diagonal, what
// lies left of it is neither computed nor touched.
struct MatrixPlace {
  int64_t first, stride, diagonal;

  int64_t outside(int64_t row, int64_t column) const { return std::max<int64_t>(0, row + diagonal - column); }

  template <class Tile>
  void prefetch(const Tile& tile, int64_t row, int64_t column) const {
    const auto body = [](const auto& window, double) { window.prefetch(); };
    visit(tile, tile.work.squares, row, column, body);
    visit(tile, tile.work.sums, row, column, body);
  }

  template <class Tile, class R>
  void add_cell(const Tile& tile, int64_t row, int64_t column, const Target<R>& cell) const {
    visit(tile, tile.work.squares, row, column,
          [&](const auto& window, double scale) { window.add(reinterpret_cast<R*>(cell.squares), scale); });
    visit(tile, tile.work.sums, row, column,
          [&](const auto& window, double scale) { window.add(reinterpret_cast<R*>(cell.sums), scale); });
  }

  template <class Tile>
  void add_tile(const Tile&) const {}

  // body(window, scale) with the part of an accumulator that starts at a row and a column of the tile.
  template <class Tile, class Body>
  void visit(const Tile& tile, const Output& output, int64_t row, int64_t column, const Body& body) const {
    if (!output.sink) return;
    const int64_t rows = std::min<int64_t>(kBlockRows, tile.g.size() - row);
    const int64_t columns = std::min<int64_t>(Tile::kColumns, tile.x.size() - column), offset = first + row * stride + column;
    const int64_t start = diagonal + row - column;
    if (output.sink.is_double) {
      body(Window<double>{static_cast<double*>(output.sink.data) + offset, stride, rows, columns, start}, output.scale);
    } else {
      body(Window<float>{static_cast<float*>(output.sink.data) + offset, stride, rows, columns, start}, output.scale);
    }
  }
};
