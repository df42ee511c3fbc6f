// SPDX-License-Identifier: Apache-2.0
// linear_sq for 16-bit inputs, by tensor cores: mma.sync with float sums, fed by an asynchronous copy pipeline.
#pragma once

#include "cuda/linear_sq.cuh"
#include "cuda/tile_mma.cuh"

namespace fisherfast {

// Registers of a thread without total: 64 for c, 64 for the squares, 24 for fragments of g and x, about 40 for addresses:
// one block of 8 warps per multiprocessor (255 registers are allowed). With total the tile is halved: 32 + 32 + 32.
template <typename In, bool kTotal_>
struct MmaTraits : MmaTile<In, kTotal_ ? 64 : 128> {
  static constexpr bool kTotal = kTotal_;
};

template <typename In>
struct LinearSqMmaParams {
  LinearSqParams<In> op;
  bool x_aligned, g_aligned;  // 16-byte copies possible
};

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    linear_sq_mma_kernel(const __grid_constant__ LinearSqMmaParams<typename Traits::In> params) {
  extern __shared__ __align__(16) uint16_t stages[];
  constexpr int kMmaO = Traits::kMmaO, kMmaI = Traits::kMmaI;
  const auto& p = params.op;
  const LinearSqBlock<Traits> block(p, blockIdx.y, blockIdx.x);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int o0 = block.o0 + warp / Traits::kWarpsI * kMmaO * 16 + lane / 4;
  const int i0 = block.i0 + warp % Traits::kWarpsI * kMmaI * 8 + lane % 4 * 2;

  Walk<Traits::kRows> load(p.samples, p.samples_per_split), use(load);
  const uint16_t *x = nullptr, *g = nullptr;
  auto load_stage = [&](int stage) {
    if (load.valid()) {
      if (load.t == 0) {
        x = reinterpret_cast<const uint16_t*>(p.x.sample(p.samples, load.n));
        g = reinterpret_cast<const uint16_t*>(p.g.sample(p.samples, load.n));
      }
      uint16_t* target = stages + stage * Traits::kStage;
      load_tile<Traits, Traits::kTileO>(target, p.g, params.g_aligned, g + load.t * p.g.stride_t, load.rows(), block.o0);
      target += Traits::kRows * Traits::kTileO;
      load_tile<Traits, Traits::kTileI>(target, p.x, params.x_aligned, x + load.t * p.x.stride_t, load.rows(), block.i0);
      load.next(p.samples);
    }
    cp_async_commit();
  };
  for (int stage = 0; stage < Traits::kStages - 1; ++stage) load_stage(stage);

  float c[kMmaO][kMmaI][4] = {}, squares[kMmaO][kMmaI][4] = {}, totals[kMmaO][kMmaI][4] = {};
  for (int stage = 0, samples = 0; use.valid(); stage = (stage + 1) % Traits::kStages) {
    cp_async_wait<Traits::kStages - 2>();
    __syncthreads();  // this stage has arrived for all, and nobody reads the one filled next any more
    load_stage((stage + Traits::kStages - 1) % Traits::kStages);
    const uint16_t* tile = stages + stage * Traits::kStage;
    multiply_stage<Traits>(c, tile, tile + Traits::kRows * Traits::kTileO, use.rows());

    const int n = use.n;
    const bool ends_sample = use.ends_sample();
    use.next(p.samples);
    if (!ends_sample) continue;
    const float w = p.weight ? p.weight[n] : 1.0f;
    float norm = 0;
    Traits::for_each_owned([&](int o, int i, int e) {
      const float value = c[o][i][e], square = value * value;
      squares[o][i][e] += w * square;
      if (Traits::kTotal) totals[o][i][e] += w * value;
      norm += square;
      c[o][i][e] = 0;
    });
    if (p.norms) emit_norm<Traits::kThreads>(p, n, norm);
    if (++samples % kSamplesPerFlush != 0 && use.valid()) continue;
    block.template emit<kMmaO * kMmaI * 4>(samples, [&](const auto& visit) {
      Traits::for_each_owned([&](int o, int i, int e) {
        visit(o0 + o * 16 + e / 2 * 8, i0 + i * 8 + e % 2, squares[o][i][e], totals[o][i][e]);
      });
    });
  }
}

}  // namespace fisherfast
