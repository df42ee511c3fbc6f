// SPDX-License-Identifier: Apache-2.0
// How work is cut among the blocks of a grid: pure functions, which a test runs on the CPU.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define FISHERFAST_PLAN __host__ __device__
#else
#define FISHERFAST_PLAN
#endif

namespace fisherfast {

FISHERFAST_PLAN inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The rows that a multiprocessor multiplies while a tile goes into a workspace and out of it again, by the data sheet's rates:
// 128 x 192 floats, at 20 bytes a clock, are 700 rows of tensor cores. Multiply-add units take nine times as long for a row.
template <typename In>
constexpr int64_t kWorkspaceRows = sizeof(In) == 2 ? 768 : 64;

// Splits of a sum, so that few tiles still fill the device: the fewest that bring the time, in units of work of the busiest
// multiprocessor, to within a tenth of the best. `detour`: the units that pass while a tile takes its way through a workspace.
inline int choose_splits(int64_t tiles, int64_t units, int64_t detour, int64_t multiprocessors) {
  const auto time = [&](int64_t splits) {
    return ceil_div(tiles * splits, multiprocessors) * (ceil_div(units, splits) + (splits > 1 ? detour : 0));
  };
  const int64_t most = std::max<int64_t>(1, std::min(units, 4 * multiprocessors / tiles));
  int64_t best = time(1);
  for (int64_t splits = 2; splits <= most; ++splits) best = std::min(best, time(splits));
  int64_t splits = 1;
  while (10 * time(splits) > 11 * best) ++splits;
  return static_cast<int>(splits);
}

// The tiles on and above the diagonal of a square, column by column: number b (b + 1) / 2 + a lies in row a <= column b.
struct UpperTile {
  int row, column;

  FISHERFAST_PLAN explicit UpperTile(int64_t index) {
    column = static_cast<int>((std::sqrt(8.0 * static_cast<double>(index) + 1.0) - 1.0) / 2.0);  // exact, or one off
    if (first(column) > index) --column;
    if (first(column + 1) <= index) ++column;
    row = static_cast<int>(index - first(column));
  }
  static FISHERFAST_PLAN int64_t first(int64_t column) { return column * (column + 1) / 2; }
};

// The tiles of a matrix for clusters of blocks, which take tiles below one another: in strips of kStrip columns, row by row in
// each, so that those that run at the same time share operands in L2. The last row of clusters may reach beyond the matrix.
struct StripTile {
  int row, column;
};
struct TileGrid {
  static constexpr int kStrip = 12;
  int rows, columns;

  FISHERFAST_PLAN int cluster() const { return rows > 1 ? 2 : 1; }
  FISHERFAST_PLAN int64_t blocks() const { return ceil_div(rows, cluster()) * cluster() * columns; }
  FISHERFAST_PLAN StripTile of_block(int64_t block) const {
    const int64_t height = ceil_div(rows, cluster()), index = block / cluster();
    const int64_t first = index / (height * kStrip) * kStrip, rest = index - first * height;
    const int64_t width = columns - first < kStrip ? columns - first : kStrip;
    return {static_cast<int>(rest / width * cluster() + block % cluster()), static_cast<int>(first + rest % width)};
  }
};

// The width of a Hopper tile of 128 rows: 192 or 128. A row of either takes so many clocks, by the bytes it needs from L2 (2 (128
// + width / 2) at 32 a clock and multiprocessor: an estimate, nothing measured), which is more than shared memory and products
// need. The wider tile does more with them, and wastes more where the matrix or the device does not divide by it.
inline int choose_width(int64_t tiles_of_192, int64_t tiles_of_128, int64_t multiprocessors) {
  const auto clocks = [&](int64_t tiles, int64_t of_a_row) {
    const double waves = static_cast<double>(tiles) / static_cast<double>(multiprocessors);
    return of_a_row * (waves <= 1 ? waves : std::ceil(waves));  // samples are split where tiles are few
  };
  return clocks(tiles_of_192, 14) <= clocks(tiles_of_128, 12) ? 192 : 128;
}

// The stage-th piece of at most kRows rows of N groups of T rows, each group cut by itself.
template <int kRows>
struct Stage {
  int n, t, count;

  FISHERFAST_PLAN Stage(int stage, int T) {
    const int pieces = static_cast<int>(ceil_div(T, kRows));
    n = stage / pieces;
    t = (stage - n * pieces) * kRows;
    count = T - t < kRows ? T - t : kRows;
  }
};

}  // namespace fisherfast
