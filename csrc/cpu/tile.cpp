// SPDX-License-Identifier: Apache-2.0
#include "cpu/tile.h"

#include <unistd.h>

#include "cpu/isa.h"

namespace fisherfast {
namespace {

// A tile takes half of the L2 cache; larger tiles bring their operands less often.
int64_t cache_scale() {
#if defined(_SC_LEVEL2_CACHE_SIZE)
  static const int64_t scale = std::clamp<int64_t>(sysconf(_SC_LEVEL2_CACHE_SIZE) >> 20, 1, 2);
  return scale;
#else
  return 1;
#endif
}

// The cheapest of the few ways to cut rows x columns into tiles that fit: time is that of the busiest worker.
Tiling cheapest(int64_t rows, int64_t columns, int64_t block_rows, int64_t block_columns, int64_t max_rows, int64_t max_columns,
                int64_t workers) {
  constexpr int64_t kOperandCost = 10;  // bringing an operand's element to the core, in multiply-adds
  const int64_t more = std::min<int64_t>(workers, 16);
  const int64_t row_blocks = ceil_div(rows, block_rows), column_blocks = ceil_div(columns, block_columns);
  const int64_t least_down = ceil_div(rows, max_rows);
  const int64_t least_across = ceil_div(columns, max_columns / block_columns * block_columns);
  Tiling best{};
  int64_t least = INT64_MAX;
  for (int64_t down = least_down; down <= std::min(row_blocks, least_down + more); ++down)
    for (int64_t across = least_across; across <= std::min(column_blocks, least_across + more); ++across) {
      const int64_t high = ceil_div(row_blocks, down) * block_rows, wide = ceil_div(column_blocks, across) * block_columns;
      const int64_t tiles = ceil_div(rows, high) * ceil_div(columns, wide);
      const int64_t cost = ceil_div(tiles, workers) * (high * wide + kOperandCost * (high + wide));
      if (cost < least) {
        least = cost;
        best = {high, wide, ceil_div(rows, high), ceil_div(columns, wide)};
      }
    }
  return best;
}

}  // namespace

bool matrix_registers_pay(const Samples& samples, int64_t rows, int64_t columns, int64_t least_products) {
  constexpr int64_t kStep = 32;
  const int64_t mean = samples.M / std::max<int64_t>(samples.N, 1);
  return isa() == Isa::amx && 10 * mean >= 7 * ceil_div(mean, kStep) * kStep &&
         rows * columns >= least_products * (rows + columns);
}

int64_t threads_for(int64_t products) {
  constexpr int64_t kProductsPerThread = 1 << 20;  // with fewer, a second thread does not pay
  return std::min<int64_t>(torch::stable::get_num_threads(), 1 + products / kProductsPerThread);
}

// A tile is as high as its buffers (sums and an unfinished sample want their own) leave room for in L2.
Tiling plan(const Tiles& tiles, int64_t rows, int64_t columns, int64_t block_rows, int64_t block_columns, int64_t bytes,
            int64_t threads, bool tall) {
  const int64_t buffers = (tiles.squares.sink && tiles.sums.sink) + (tiles.longest > kDepth) + 1;
  const int64_t fitting = (tall ? kTallTileRows : kMaxTileRows) * cache_scale();
  const int64_t max_rows = fitting * static_cast<int64_t>(sizeof(float)) / (bytes * buffers);
  return cheapest(rows, columns, block_rows, block_columns, max_rows, tall ? kTallTileColumns : kMaxTileColumns, threads);
}

}  // namespace fisherfast
