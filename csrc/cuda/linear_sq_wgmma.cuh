// SPDX-License-Identifier: Apache-2.0
// linear_sq for 16-bit inputs on Hopper: one warpgroup copies, two multiply. While one of the two squares what its sample gave,
// the other has products under way.
#pragma once

#include "cuda/linear_sq.cuh"
#include "cuda/tile_wgmma.cuh"

namespace fisherfast {

// Registers of a multiplying thread: 96 for c and 96 for the squares; with total, 64 for each of the three.
template <typename In, int kTileI, bool kTotal_>
struct WgmmaTraits : WgmmaTile<In, kTileI> {
  static constexpr bool kTotal = kTotal_;
  static constexpr int kWarps = WgmmaTile<In, kTileI>::kMultipliers * 4;  // each stores its share of |c_n|^2
  static constexpr int kAhead = kTotal ? kFewRegisters : kManyRegisters;
  static_assert(kTileI <= (kTotal ? 128 : 192), "sums and product stay in registers");
};

template <typename In>
struct LinearSqWgmmaParams {
  TensorMap x, g;
  LinearSqParams<In> op;
  TileGrid tiles;
};

// The lines of acc that a block will add to, on their way into L2 by the copying warpgroup's warps that copy nothing.
template <typename Traits>
__device__ void prefetch_tile(const LinearSqParams<typename Traits::In>& p, int tile_o, int tile_i) {
  constexpr int kIdle = kWarpgroup - 32, kBytes = 128;
  const int element = p.acc.is_double ? 8 : 4, lines = Traits::kTileI * element / kBytes;
  for (int line = threadIdx.x % kWarpgroup - 32; line < Traits::kTileO * lines; line += kIdle) {
    const int64_t o = tile_o + line / lines, i = tile_i + line % lines * (kBytes / element);
    if (o < p.g.width && i < p.x.width) prefetch_l2(static_cast<const char*>(p.acc.data) + (o * p.x.width + i) * element);
  }
}

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    linear_sq_wgmma_kernel(const __grid_constant__ LinearSqWgmmaParams<typename Traits::In> params) {
#ifdef FISHERFAST_HAS_WGMMA
  const auto& p = params.op;
  auto& stages = Stages<Traits>::here();
  stages.init(params.g, params.x);
  const StripTile tile = params.tiles.of_block(blockIdx.x);
  const LinearSqBlock<Traits> block(p, tile.row, tile.column);
  Walk<Traits::kRows> walk(p.samples, p.samples_per_split);
  Ring<Traits::kStages> ring;

  if (threadIdx.x / kWarpgroup == Traits::kMultipliers) {
    give_registers<Traits::kCopyRegisters>();
    if (threadIdx.x % kWarpgroup == 0) {
      for (; walk.valid(); walk.next(p.samples), ring.next()) {
        const int64_t* const offsets = p.samples.offsets;
        const int n = offsets ? 0 : walk.n, t = walk.t + (offsets ? static_cast<int>(offsets[walk.n]) : 0);
        stages.load(ring, params.g, block.o0, params.x, block.i0, t, n);
      }
    } else if (threadIdx.x % kWarpgroup >= 32 && !p.partial) {
      prefetch_tile<Traits>(p, block.o0, block.i0);
    }
    cluster_arrive();
  } else {
    take_registers<Traits::kMultiplyRegisters>();
    float c[Traits::kOwned], squares[Traits::kOwned] = {}, totals[Traits::kOwned] = {};
    const auto arrived = [&] {
      stages.full[ring.stage].wait(ring.parity);
      if (p.samples.offsets && walk.rows() % 16 != 0) stages.clear(ring.stage, walk.rows());  // they are the next sample's
    };
    int samples = 0;
    for (; walk.valid(); ring.next()) {
      const int n = walk.n;
      const float w = p.weight ? p.weight[n] : 1.0f;
      arrived();
      stages.template multiply<true>(c, ring, walk.rows());
      for (walk.next(p.samples); walk.valid() && walk.n == n; walk.next(p.samples)) {
        ring.next();
        arrived();
        stages.template multiply<false>(c, ring, walk.rows());
        stages.template release_after<1>(ring.before());
      }
      stages.template release_after<0>(ring.stage);
      if (!walk.valid()) cluster_arrive();  // before the last sums are stored: nobody waits for these

      if (p.norms) {
        float sums[4] = {};  // chains that do not wait for one another
        Traits::for_each_owned([&](int, int, int e) { sums[e % 4] += c[e] * c[e]; });
        const float norm = warp_sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
        const int64_t first = (static_cast<int64_t>(n) * gridDim.x + blockIdx.x) * Traits::kWarps;
        if (threadIdx.x % 32 == 0) p.norms[first + threadIdx.x / 32] = norm;
      }
      Traits::for_each_owned([&](int, int, int e) {
        const float weighted = w * c[e];
        squares[e] += weighted * c[e];
        if (Traits::kTotal) totals[e] += weighted;
      });
      if (++samples % kSamplesPerFlush != 0 && walk.valid()) continue;
      const int o0 = opaque(block.o0), i0 = opaque(block.i0);
      block.template emit<Traits::kOwned, Traits::kAhead>(samples, [&](const auto& visit) {
        Traits::for_each_owned([&](int o, int i, int e) { visit(o0 + o, i0 + i, squares[e], totals[e]); });
      });
    }
    if (samples == 0) cluster_arrive();
  }
  cluster_wait();  // a block that has left could not be copied into, nor told of anything
#endif
}

}  // namespace fisherfast
