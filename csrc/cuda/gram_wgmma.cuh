// SPDX-License-Identifier: Apache-2.0
// gram for 16-bit inputs without weights on Hopper, on the pipeline of linear_sq: both operands are x.
#pragma once

#include "cuda/gram.cuh"
#include "cuda/tile_wgmma.cuh"

namespace fisherfast {

template <typename In>
struct GramWgmmaParams {
  TensorMap left, right;  // of the same x, with the boxes of either operand
  GramParams<In> op;
  TileGrid tiles;  // of the whole square: blocks below the diagonal leave at once
};

// Does a cluster that begins at this row reach the diagonal in this column?
template <typename Tile>
FISHERFAST_PLAN bool reaches(int64_t row, int64_t column) {
  return (column + 1) * Tile::kTileI > row * Tile::kTileO;
}

// The blocks that have work, of which those beyond the last row have none but to copy.
template <typename Tile>
int64_t upper_tiles(const TileGrid& tiles) {
  int64_t count = 0;
  for (int row = 0; row < tiles.rows; row += tiles.cluster())
    for (int column = 0; column < tiles.columns; ++column) count += reaches<Tile>(row, column) ? tiles.cluster() : 0;
  return count;
}

// The sums over rows of the features of the left operand: of each warp's 16 features, a lane has two, over a quarter of the rows,
// chosen so that a warp reads all banks.
template <typename Tile>
struct FeatureSums {
  double sums[2] = {};

  __device__ void take(const Stages<Tile>& stages, int stage) {
    const int lane = threadIdx.x % 32, word = threadIdx.x / 32 % 4 * 8 + lane % 8;
    const uint16_t* const box = stages.boxes[stage] + threadIdx.x / kWarpgroup * Tile::kBox;
    float part[2] = {};
#pragma unroll
    for (int t = 0; t < Tile::kRows; t += 8)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int row = t + lane / 8 * 2 + r, place = row * kBoxFeatures + (word / 4 ^ row % 8) * 8 + word % 4 * 2;
        const uint32_t pair = *reinterpret_cast<const uint32_t*>(box + place);
        for (int e = 0; e < 2; ++e) {
          typename Tile::In value;
          value.x = static_cast<uint16_t>(pair >> 16 * e);
          part[e] += static_cast<float>(value);
        }
      }
    for (int e = 0; e < 2; ++e) sums[e] += part[e];
  }

  // visit(feature, sum) for the two features of each lane that has them, and starts again.
  template <typename Visit>
  __device__ void flush(Visit visit) {
    const int lane = threadIdx.x % 32, first = threadIdx.x / 32 * 16 + lane % 8 * 2;
    for (int e = 0; e < 2; ++e) {
      for (int distance = 16; distance >= 8; distance /= 2) sums[e] += __shfl_down_sync(0xffffffffu, sums[e], distance);
      if (lane < 8) visit(first + e, static_cast<float>(sums[e]));
      sums[e] = 0;
    }
  }
};

// Registers of a multiplying thread: kTileI / 2 for c and as many for the sums, 4 for the column of ones.
template <typename Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    gram_wgmma_kernel(const __grid_constant__ GramWgmmaParams<typename Tile::In> params) {
#ifdef FISHERFAST_HAS_WGMMA
  constexpr int kRows = Tile::kRows;
  const auto& p = params.op;
  const StripTile tile = params.tiles.of_block(blockIdx.x);
  if (!reaches<Tile>(tile.row - cluster_rank(), tile.column)) return;
  auto& stages = Stages<Tile>::here();
  stages.init(params.left, params.right);
  const GramBlock<Tile> block(p, tile.row, tile.column);
  Ring<Tile::kStages> ring;

  if (threadIdx.x / kWarpgroup == Tile::kMultipliers) {
    give_registers<Tile::kCopyRegisters>();
    if (threadIdx.x % kWarpgroup == 0) {
      for (int stage = block.begin; stage < block.end; ++stage, ring.next()) {
        const Stage<kRows> rows(stage, p.T);
        stages.load(ring, params.left, block.i0, params.right, block.j0, rows.t, rows.n);
      }
    }
    cluster_arrive();
  } else {
    take_registers<Tile::kMultiplyRegisters>();
    float c[Tile::kOwned], sums[Tile::kOwned] = {};
    FeatureSums<Tile> features;
    int count = 0;
    const auto multiply = [&](auto start, int stage) {
      const Stage<kRows> rows(stage, p.T);
      stages.full[ring.stage].wait(ring.parity);
      stages.template multiply<decltype(start)::value>(c, ring, rows.count);
      count += rows.count;
      if (!block.bias) return;
      features.take(stages, ring.stage);
      named_sync(1 + threadIdx.x / kWarpgroup, kWarpgroup);  // the whole warpgroup has, before one thread says so
    };
    for (int stage = block.begin; stage < block.end; ++stage, ring.next()) {
      multiply(std::true_type{}, stage);
      while (!block.ends(stage, kChainRows)) {
        ring.next();
        multiply(std::false_type{}, ++stage);
        stages.template release_after<1>(ring.before());
      }
      stages.template release_after<0>(ring.stage);
      if (stage + 1 == block.end) cluster_arrive();  // before the last sums are stored: nobody waits for these
      Tile::for_each_owned([&](int, int, int e) { sums[e] += c[e]; });

      if (!block.ends(stage, kFlushRows)) continue;
      const int i0 = opaque(block.i0), j0 = opaque(block.j0);
      block.template add_products<Tile::kOwned>(stage, [&](const auto& visit) {
        Tile::for_each_owned([&](int i, int j, int e) { visit(i0 + i, j0 + j, sums[e]); });
      });
      Tile::for_each_owned([&](int, int, int e) { sums[e] = 0; });
      if (block.bias) features.flush([&](int feature, float sum) { block.add_sum(stage, i0 + feature, sum); });
    }
    if (threadIdx.x == 0) block.add_count(count);
  }
  cluster_wait();  // a block that has left could not be copied into, nor told of anything
#endif
}

}  // namespace fisherfast
