// SPDX-License-Identifier: Apache-2.0
// gram for 16-bit inputs without weights, by tensor cores: mma.sync with float sums. A tile on the diagonal loads x once, for
// both operands.
#pragma once

#include "cuda/gram.cuh"
#include "cuda/tile_mma.cuh"

namespace fisherfast {

// sums[i] += sum_m x[m,i]: a product with ones that are nowhere in memory. Each warp takes 16 columns.
template <typename Tile>
__device__ void sum_stage(float (&sums)[4], const uint16_t* x, int rows) {
  static_assert(Tile::kTileO == Tile::kThreads / 32 * 16, "a fragment for each warp");
  const uint32_t one = typename Tile::In(1.0f).x, ones = one | one << 16;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int t = 0; t < rows; t += 16) {
    uint32_t a[4];
    ldmatrix_x4_trans(a, x + swizzled<Tile::kTileO>(t + lane % 8 + lane / 16 * 8, warp * 2 + lane / 8 % 2));
    mma_16816<typename Tile::In>(sums, a, ones, ones);
  }
}

template <typename In>
using GramMma = MmaTile<In, 128>;

// Registers of a thread: 64 for c, 64 for the sums, 24 for fragments, 8 for the column of ones, about 40 for addresses.
template <typename In>
__global__ void __launch_bounds__(GramMma<In>::kThreads, 1) gram_mma_kernel(const __grid_constant__ GramParams<In> p) {
  using Tile = GramMma<In>;
  constexpr int kTile = Tile::kTileO, kRows = Tile::kRows, kStages = Tile::kStages;
  static_assert(Tile::kTileI == kTile, "tiles of the triangle are square");
  extern __shared__ __align__(16) uint16_t stages[];
  const UpperTile tile(blockIdx.x);
  const bool diagonal = tile.row == tile.column;
  const GramBlock<Tile> block(p, tile.row, tile.column);
  const auto load = [&](int stage) {
    if (stage < block.end) {
      const Stage<kRows> rows(stage, p.T);
      const auto* first = reinterpret_cast<const uint16_t*>(block.row(rows));
      uint16_t* const target = stages + stage % kStages * Tile::kStage;
      load_tile<Tile, kTile>(target, p.x, p.in_vectors, first, rows.count, block.i0);
      if (!diagonal) load_tile<Tile, kTile>(target + kRows * kTile, p.x, p.in_vectors, first, rows.count, block.j0);
    }
    cp_async_commit();
  };
  for (int stage = block.begin; stage < block.begin + kStages - 1; ++stage) load(stage);

  float c[Tile::kMmaO][Tile::kMmaI][4] = {}, sums[Tile::kMmaO][Tile::kMmaI][4] = {};
  float c_ones[4] = {}, sums_ones[4] = {};
  double count = 0;
  for (int stage = block.begin; stage < block.end; ++stage) {
    cp_async_wait<kStages - 2>();
    __syncthreads();  // this stage has arrived for all, and nobody reads the one filled next any more
    load(stage + kStages - 1);
    const Stage<kRows> rows(stage, p.T);
    const uint16_t* const left = stages + stage % kStages * Tile::kStage;
    multiply_stage<Tile>(c, left, diagonal ? left : left + kRows * kTile, rows.count);
    if (block.bias) sum_stage<Tile>(c_ones, left, rows.count);
    count += rows.count;

    if (!block.ends(stage, kChainRows)) continue;
    const auto take = [](float& sum, float& value) {
      sum += value;
      value = 0;
    };
    Tile::for_each_owned([&](int o, int i, int e) { take(sums[o][i][e], c[o][i][e]); });
    for (int e = 0; e < 4; ++e) take(sums_ones[e], c_ones[e]);
    if (!block.ends(stage, kFlushRows)) continue;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int i0 = block.i0 + warp / Tile::kWarpsI * Tile::kMmaO * 16 + lane / 4;
    const int j0 = block.j0 + warp % Tile::kWarpsI * Tile::kMmaI * 8 + lane % 4 * 2;
    block.template add_products<Tile::kMmaO * Tile::kMmaI * 4>(stage, [&](const auto& visit) {
      Tile::for_each_owned([&](int o, int i, int e) { visit(i0 + o * 16 + e / 2 * 8, j0 + i * 8 + e % 2, sums[o][i][e]); });
    });
    Tile::for_each_owned([&](int o, int i, int e) { sums[o][i][e] = 0; });
    if (!block.bias) continue;
    if (lane % 4 == 0) {  // the eight columns of the product with ones are the same
      block.add_sum(stage, block.i0 + warp * 16 + lane / 4, sums_ones[0]);
      block.add_sum(stage, block.i0 + warp * 16 + lane / 4 + 8, sums_ones[2]);
    }
    for (int e = 0; e < 4; ++e) sums_ones[e] = 0;
  }
  if (threadIdx.x == 0) block.add_count(count);
}

}  // namespace fisherfast
