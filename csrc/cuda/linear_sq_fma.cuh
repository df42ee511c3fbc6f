// SPDX-License-Identifier: Apache-2.0
// linear_sq by fused multiply-adds in float32 or float64, for any strides. Two uses: one product per sample, squared at its
// end (kPooled = false); or, for T = 1, one product over all samples, of squares formed while loading (kPooled = true):
// sum_n w_n (g x)^2 = sum_n (w_n g^2) x^2, which needs one multiply-add where the other form needs three.
#pragma once

#include "cuda/linear_sq.cuh"
#include "cuda/plan.h"
#include "cuda/tile_fma.cuh"

namespace fisherfast {

// Registers of a thread: kMicroO kMicroI for each of c, squares and totals, 16 for fragments, 8 for prefetched elements.
// float32, 8x8: 64 + 64 + 24 and addresses; float32 with total, 8x4: 96 + 24; float64, 4x4 pairs: 96 + 32 at most.
template <typename In, bool kPooled_, bool kTotal_>
struct FmaTraits : FmaTile<In, kTotal_ ? 4 : 8> {
  static constexpr bool kPooled = kPooled_, kTotal = kTotal_;
  static_assert(!(kPooled && kTotal), "a pooled product has one output");
};

// What a pooled kernel is told: groups of rows are its samples. Squared they give acc, as they are total.
template <typename In>
LinearSqParams<In> pooled(LinearSqParams<In> p, bool squared) {
  constexpr int kGroup = 32;
  p.samples.T = kGroup;
  p.samples.N = ceil_div(p.samples.M, kGroup);
  for (Rows<In>* rows : {&p.x, &p.g}) {
    rows->stride_t = rows->stride_n;
    rows->stride_n *= kGroup;
  }
  p.squared = squared;
  if (!squared) {
    p.acc = p.total;
    p.scale = 1.0;
  }
  return p;
}

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    linear_sq_fma_kernel(const __grid_constant__ LinearSqParams<typename Traits::In> p) {
  using In = typename Traits::In;
  using Real = typename Traits::Real;
  constexpr int kMicroO = Traits::kMicroO, kMicroI = Traits::kMicroI;
  __shared__ __align__(16) Real g_tile[2][Traits::kRows][Traits::kTileO], x_tile[2][Traits::kRows][Traits::kTileI];
  const LinearSqBlock<Traits> block(p, blockIdx.y, blockIdx.x);
  const int thread_o = threadIdx.x / Traits::kSide, thread_i = threadIdx.x % Traits::kSide;

  Walk<Traits::kRows> load(p.samples, p.samples_per_split), use(load);
  Prefetch<Traits, Traits::kTileO, Traits::kPooled> g_next;
  Prefetch<Traits, Traits::kTileI, Traits::kPooled> x_next;
  const In *x = nullptr, *g = nullptr;
  auto fetch = [&] {
    if (load.t == 0) {
      x = p.x.sample(p.samples, load.n);
      g = p.g.sample(p.samples, load.n);
    }
    // A pooled product's rows are samples: each has its weight.
    const float* weight = Traits::kPooled && p.weight ? p.weight + load.n * p.samples.T + load.t : nullptr;
    g_next.get(p.g, g + load.t * p.g.stride_t, weight, load.rows(), block.o0);
    x_next.get(p.x, x + load.t * p.x.stride_t, nullptr, load.rows(), block.i0);
    load.next(p.samples);
  };
  auto put = [&](int buffer) {
    g_next.put(g_tile[buffer], p.squared);
    x_next.put(x_tile[buffer], p.squared);
  };
  if (load.valid()) {
    fetch();
    put(0);
  }
  __syncthreads();

  Real c[kMicroO][kMicroI] = {}, squares[kMicroO][kMicroI] = {}, totals[kMicroO][kMicroI] = {};
  for (int buffer = 0, samples = 0; use.valid(); buffer ^= 1) {
    const bool more = load.valid();
    if (more) fetch();
#pragma unroll
    for (int t = 0; t < Traits::kRows; ++t) {
      Real g_row[kMicroO], x_row[kMicroI];
      read_fragment<Traits>(g_row, g_tile[buffer][t], thread_o);
      read_fragment<Traits>(x_row, x_tile[buffer][t], thread_i);
      Traits::for_each_owned([&](int o, int i) { c[o][i] += g_row[o] * x_row[i]; });
    }
    if (more) put(buffer ^ 1);
    __syncthreads();

    const int n = use.n;
    const bool ends_sample = use.ends_sample();
    use.next(p.samples);
    if (!ends_sample) continue;
    const Real w = !Traits::kPooled && p.weight ? p.weight[n] : 1.0f;
    Real norm = 0;
    Traits::for_each_owned([&](int o, int i) {
      const Real square = Traits::kPooled ? c[o][i] : c[o][i] * c[o][i];
      squares[o][i] += w * square;
      if (Traits::kTotal) totals[o][i] += w * c[o][i];
      norm += square;
      c[o][i] = 0;
    });
    if (p.norms) emit_norm<Traits::kThreads>(p, n, norm);
    if (++samples % kSamplesPerFlush != 0 && use.valid()) continue;
    block.template emit<kMicroO * kMicroI>(samples, [&](const auto& visit) {
      Traits::for_each_owned([&](int o, int i) {
        visit(block.o0 + Traits::owned(thread_o, o), block.i0 + Traits::owned(thread_i, i), squares[o][i], totals[o][i]);
      });
    });
  }
}

template <typename In>
struct RankOneNormParams {
  Rows<In> x, g;
  Output sqnorm;
  const int32_t* flag;
};

// T = 1: |g_n x_n^T|^2 = |g_n|^2 |x_n|^2. One block per sample.
template <typename In>
__global__ void __launch_bounds__(32) rank_one_norm_kernel(const __grid_constant__ RankOneNormParams<In> p) {
  const auto norm = [](const Rows<In>& rows) {
    compute_t<In> sum = 0;
    const In* row = rows.data + blockIdx.x * rows.stride_n;
    for (int64_t d = threadIdx.x; d < rows.width; d += 32) {
      const auto value = static_cast<compute_t<In>>(row[d * rows.stride_d]);
      sum += value * value;
    }
    return static_cast<double>(warp_sum(sum));
  };
  const double x = norm(p.x), g = norm(p.g);
  if (threadIdx.x == 0 && !is_up(p.flag)) p.sqnorm.add(blockIdx.x, x * g);
}

}  // namespace fisherfast
