// SPDX-License-Identifier: Apache-2.0
// gram by fused multiply-adds: float32 and float64 inputs, any strides, and 16-bit inputs with weights, whose products are not
// rounded to 16 bits.
#pragma once

#include "cuda/gram.cuh"
#include "cuda/tile_fma.cuh"

namespace fisherfast {

template <typename In>
using GramFma = FmaTile<In, 8>;

// Registers of a thread: 64 for c, 64 for the sums, 16 for fragments, 16 for the column of ones, 12 for prefetched elements.
template <typename In>
__global__ void __launch_bounds__(GramFma<In>::kThreads, 1) gram_fma_kernel(const __grid_constant__ GramParams<In> p) {
  using Tile = GramFma<In>;
  using Real = typename Tile::Real;
  constexpr int kTile = Tile::kTileO, kRows = Tile::kRows, kMicro = Tile::kMicroO;
  static_assert(Tile::kTileI == kTile, "tiles of the triangle are square");
  __shared__ __align__(16) Real left[2][kRows][kTile], right[2][kRows][kTile];
  const UpperTile tile(blockIdx.x);
  const GramBlock<Tile> block(p, tile.row, tile.column);
  const int thread_i = threadIdx.x / Tile::kSide, thread_j = threadIdx.x % Tile::kSide;

  Prefetch<Tile, kTile, true> next_left;  // with the weights
  Prefetch<Tile, kTile, false> next_right;
  const auto fetch = [&](int stage) {
    const Stage<kRows> rows(stage, p.T);
    next_left.get(p.x, block.row(rows), block.weight(rows), rows.count, block.i0);
    next_right.get(p.x, block.row(rows), nullptr, rows.count, block.j0);
  };
  const auto put = [&](int buffer) {
    next_left.put(left[buffer], false);
    next_right.put(right[buffer], false);
  };
  fetch(block.begin);
  put(0);
  __syncthreads();

  Real c[kMicro][kMicro] = {}, sums[kMicro][kMicro] = {}, c_ones[kMicro] = {}, sums_ones[kMicro] = {};
  double count = 0;
  for (int stage = block.begin, buffer = 0; stage < block.end; ++stage, buffer ^= 1) {
    const bool more = stage + 1 < block.end;
    if (more) fetch(stage + 1);
    const Stage<kRows> rows(stage, p.T);
    if (static_cast<int>(threadIdx.x) < rows.count) count += p.weight ? block.weight(rows)[threadIdx.x] : 1.0f;
#pragma unroll
    for (int t = 0; t < kRows; ++t) {
      Real x_i[kMicro], x_j[kMicro];
      read_fragment<Tile>(x_i, left[buffer][t], thread_i);
      read_fragment<Tile>(x_j, right[buffer][t], thread_j);
      Tile::for_each_owned([&](int i, int j) { c[i][j] += x_i[i] * x_j[j]; });
      if (block.bias)
        for (int i = 0; i < kMicro; ++i) c_ones[i] += x_i[i];
    }
    if (more) put(buffer ^ 1);
    __syncthreads();

    if (!block.ends(stage, kChainRows)) continue;
    const auto take = [](Real& sum, Real& value) {
      sum += value;
      value = 0;
    };
    Tile::for_each_owned([&](int i, int j) { take(sums[i][j], c[i][j]); });
    for (int i = 0; i < kMicro; ++i) take(sums_ones[i], c_ones[i]);
    if (!block.ends(stage, kFlushRows)) continue;
#pragma unroll
    for (int i = 0; i < kMicro; ++i) {  // one row of the tile at a time: registers are short
      block.template add_products<kMicro>(stage, [&](const auto& visit) {
#pragma unroll
        for (int j = 0; j < kMicro; ++j)
          visit(block.i0 + Tile::owned(thread_i, i), block.j0 + Tile::owned(thread_j, j), sums[i][j]);
      });
    }
    Tile::for_each_owned([&](int i, int j) { sums[i][j] = 0; });
    for (int i = 0; i < kMicro; ++i) {
      if (block.bias && thread_j == 0) block.add_sum(stage, block.i0 + Tile::owned(thread_i, i), sums_ones[i]);
      sums_ones[i] = 0;
    }
  }
  if (threadIdx.x >= 32) return;
  count = warp_sum(count);
  if (threadIdx.x == 0) block.add_count(count);
}

}  // namespace fisherfast
