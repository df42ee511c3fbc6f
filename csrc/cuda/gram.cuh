// SPDX-License-Identifier: Apache-2.0
// The kernels of gram: acc[i,j] += scale * sum_m w_m x[m,i] x[m,j] for j >= i.
//
// A block owns a tile of the upper triangle and walks its share of the rows, in stages. grid = (tiles, shares). A tile on the
// diagonal takes along its part of the column of ones that a bias needs; for tensor cores it loads x once, for both operands.
//
// Floor: M I^2 FLOPs; bytes: x once, the upper half of acc read and written once. As tiled, with side = ceil(I / kTile): side
// (side + 1) / 2 tiles of 2 M kTile^2 FLOPs each; x is read about side times, mostly from L2: kTile FLOPs an element loaded.
#pragma once

#include "cuda/device.cuh"
#include "cuda/plan.h"
#include "cuda/tile_fma.cuh"
#include "cuda/tile_mma.cuh"

namespace fisherfast {

template <typename In>
struct GramParams {
  Rows<In> x;           // [N, T, I]
  int T, D;             // D = I, or I + 1 with a column of ones
  const float* weight;  // [N, T], or null
  const int32_t* flag;
  double scale;
  Output acc;     // [D, D]
  void* partial;  // Real [shares, D, D], or null for one share, which adds to acc itself
  int stages, stages_per_share;
  bool in_vectors;
};

// The tiles, and shares of the rows where there are fewer tiles than multiprocessors.
struct GramGrid {
  int64_t tiles, shares;
};

template <typename Tile>
GramGrid cut(GramParams<typename Tile::In>& p, int64_t N, int64_t multiprocessors) {
  constexpr int kStagesOfUnit = 128 / Tile::kRows;  // a share is a multiple of 128 rows
  p.stages = static_cast<int>(N * ceil_div(p.T, Tile::kRows));
  const int64_t side = std::max<int64_t>(1, ceil_div(p.x.width, Tile::kTileO)), tiles = UpperTile::first(side);
  const int64_t units = ceil_div(p.stages, kStagesOfUnit);
  const int64_t units_per_share = ceil_div(units, choose_splits(tiles, units, multiprocessors));
  p.stages_per_share = static_cast<int>(units_per_share * kStagesOfUnit);
  return {tiles, ceil_div(units, units_per_share)};
}

// Chains of additions are short: after kChainRows rows a thread adds the products to its sums, after kFlushRows these to memory.
// The 64 sums take as many registers as the squares of linear_sq do.
constexpr int kChainRows = 256, kFlushRows = 64 * kChainRows;

// A block's place in the work, and where its sums go.
template <typename In, int kTile, int kRows>
struct GramBlock {
  using Real = compute_t<In>;
  const GramParams<In>& p;
  int i0, j0;      // of the tile
  int begin, end;  // stages
  bool diagonal, bias;

  __device__ explicit GramBlock(const GramParams<In>& params) : p(params) {
    const UpperTile tile(blockIdx.x);
    i0 = tile.row * kTile;
    j0 = tile.column * kTile;
    begin = blockIdx.y * p.stages_per_share;
    end = min(begin + p.stages_per_share, p.stages);
    diagonal = i0 == j0;
    bias = diagonal && p.D > p.x.width;
  }
  __device__ const In* row(const Stage<kRows>& stage) const {
    return p.x.data + stage.n * p.x.stride_n + stage.t * p.x.stride_t;
  }
  __device__ const float* weight(const Stage<kRows>& stage) const {
    return p.weight ? p.weight + static_cast<int64_t>(stage.n) * p.T + stage.t : nullptr;
  }
  __device__ bool ends(int stage, int rows) const { return stage + 1 == end || (stage + 1 - begin) % (rows / kRows) == 0; }

  // Adds to element (i, j) what the stages up to this one, since the last flush, have given.
  __device__ void add(int stage, int i, int j, Real value) const {
    const int64_t index = static_cast<int64_t>(i) * p.D + j;
    if (!p.partial) return p.acc.add(index, p.scale * value);
    Real* const out = static_cast<Real*>(p.partial) + static_cast<int64_t>(blockIdx.y) * p.D * p.D + index;
    *out = stage - begin < kFlushRows / kRows ? value : *out + value;  // nobody has filled it with zeros
  }
  __device__ void add_product(int stage, int i, int j, Real value) const {
    if (i <= j && j < p.x.width) add(stage, i, j, value);
  }
  __device__ void add_sum(int stage, int i, Real value) const {
    if (i < p.x.width) add(stage, i, p.D - 1, value);
  }
  // The corner, sum_m w_m: each lane of the first tile's first warp adds up one row of every stage.
  __device__ bool counts(const Stage<kRows>& stage) const { return bias && i0 == 0 && static_cast<int>(threadIdx.x) < stage.count; }
  __device__ void add_count(double count) const {
    if (!bias || i0 != 0 || threadIdx.x >= 32) return;
    count = warp_sum(count);
    if (threadIdx.x == 0) add(begin, p.D - 1, p.D - 1, static_cast<Real>(count));
  }
};

// ---- 16-bit inputs without weights

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
  if (p.flag && *p.flag) return;
  const GramBlock<In, kTile, kRows> block(p);
  const auto load = [&](int stage) {
    if (stage < block.end) {
      const Stage<kRows> rows(stage, p.T);
      const auto* first = reinterpret_cast<const uint16_t*>(block.row(rows));
      uint16_t* const target = stages + stage % kStages * Tile::kStage;
      load_tile<Tile, kTile>(target, p.x, p.in_vectors, first, rows.count, block.i0);
      if (!block.diagonal) load_tile<Tile, kTile>(target + kRows * kTile, p.x, p.in_vectors, first, rows.count, block.j0);
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
    multiply_stage<Tile>(c, left, block.diagonal ? left : left + kRows * kTile, rows.count);
    if (block.bias) sum_stage<Tile>(c_ones, left, rows.count);
    if (block.counts(rows)) count += 1;

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
    Tile::for_each_owned([&](int o, int i, int e) {
      block.add_product(stage, i0 + o * 16 + e / 2 * 8, j0 + i * 8 + e % 2, sums[o][i][e]);
      sums[o][i][e] = 0;
    });
    if (!block.bias) continue;
    if (lane % 4 == 0) {  // the eight columns of the product with ones are the same
      block.add_sum(stage, block.i0 + warp * 16 + lane / 4, sums_ones[0]);
      block.add_sum(stage, block.i0 + warp * 16 + lane / 4 + 8, sums_ones[2]);
    }
    for (int e = 0; e < 4; ++e) sums_ones[e] = 0;
  }
  block.add_count(count);
}

// ---- all others: float32 and float64 inputs, and 16-bit inputs with weights, whose products are not rounded to 16 bits

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
  if (p.flag && *p.flag) return;
  const GramBlock<In, kTile, kRows> block(p);
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
    if (block.counts(rows)) count += p.weight ? block.weight(rows)[threadIdx.x] : 1.0f;
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
    Tile::for_each_owned([&](int i, int j) {
      block.add_product(stage, block.i0 + Tile::owned(thread_i, i), block.j0 + Tile::owned(thread_j, j), sums[i][j]);
      sums[i][j] = 0;
    });
    for (int i = 0; i < kMicro; ++i) {
      if (block.bias && thread_j == 0) block.add_sum(stage, block.i0 + Tile::owned(thread_i, i), sums_ones[i]);
      sums_ones[i] = 0;
    }
  }
  block.add_count(count);
}

}  // namespace fisherfast
