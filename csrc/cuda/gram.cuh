// SPDX-License-Identifier: Apache-2.0
// The kernels of gram: acc[i,j] += scale * sum_m w_m x[m,i] x[m,j] for j >= i.
//
// A block owns a tile of the upper triangle and walks its share of the rows, in stages. grid = (tiles, shares). The leading tile
// of a row, the one that holds its first element of the diagonal, takes along its part of the column of ones that a bias needs.
//
// Floor: M I^2 FLOPs; bytes: x once, the upper half of acc read and written once. As tiled, with side = ceil(I / kTile): side
// (side + 1) / 2 tiles of 2 M kTile^2 FLOPs each; x is read about side times, mostly from L2: kTile FLOPs an element loaded.
#pragma once

#include "cuda/device.cuh"
#include "cuda/plan.h"

namespace fisherfast {

template <typename In>
struct GramParams {
  Rows<In> x;           // [N, T, I]
  int T, D;             // D = I, or I + 1 with a column of ones
  const float* weight;  // [N, T], or null
  const int32_t* flag;
  Factor scale;
  Output acc;     // [D, D]
  void* partial;  // Real [shares, D, pitch(D)], or null for one share, which adds to acc itself
  int stages, stages_per_share;
  bool in_vectors;
};

// Square tiles of the triangle: grid = (tiles, shares).
inline int64_t square_tiles(int64_t I, int kTile) { return UpperTile::first(std::max<int64_t>(1, ceil_div(I, kTile))); }

// Cuts the rows into shares where there are fewer tiles than multiprocessors; the number of shares.
template <typename Tile>
int64_t cut_rows(GramParams<typename Tile::In>& p, int64_t tiles, int64_t N, int64_t multiprocessors) {
  constexpr int kStagesOfUnit = 128 / Tile::kRows;  // a share is a multiple of 128 rows
  p.stages = static_cast<int>(N * ceil_div(p.T, Tile::kRows));
  const int64_t units = ceil_div(p.stages, kStagesOfUnit);
  const int64_t detour = ceil_div(kWorkspaceRows<typename Tile::In>, 128);
  const int64_t units_per_share = ceil_div(units, choose_splits(tiles, units, detour, multiprocessors));
  p.stages_per_share = static_cast<int>(units_per_share * kStagesOfUnit);
  return ceil_div(units, units_per_share);
}

// Chains of additions are short: after kChainRows rows a thread adds the products to its sums, after kFlushRows these to memory.
// The sums take as many registers as the squares of linear_sq do.
constexpr int kChainRows = 256, kFlushRows = 64 * kChainRows;

// A block's place in the work, and where its sums go.
template <typename Tile>
struct GramBlock {
  using In = typename Tile::In;
  using Real = compute_t<In>;
  static constexpr int kRows = Tile::kRows;
  const GramParams<In>& p;
  int i0, j0;      // of the tile
  int begin, end;  // stages
  bool bias, corner;

  __device__ GramBlock(const GramParams<In>& params, int row, int column)
      : p(params), i0(row * Tile::kTileO), j0(column * Tile::kTileI) {
    begin = blockIdx.y * p.stages_per_share;
    end = min(begin + p.stages_per_share, p.stages);
    bias = j0 <= i0 && i0 < j0 + Tile::kTileI && p.D > p.x.width;  // it leads its row
    corner = bias && i0 == 0;
  }
  __device__ const In* row(const Stage<kRows>& stage) const { return p.x.data + stage.n * p.x.stride_n + stage.t * p.x.stride_t; }
  __device__ const float* weight(const Stage<kRows>& stage) const {
    return p.weight ? p.weight + static_cast<int64_t>(stage.n) * p.T + stage.t : nullptr;
  }
  __device__ bool ends(int stage, int rows) const { return stage + 1 == end || (stage + 1 - begin) % (rows / kRows) == 0; }

  // Adds to the kOwned elements that each(visit) hands to visit(i, j, value) what the stages up to this one, since the last
  // flush, have given.
  template <int kOwned, int kAhead, typename Inside, typename Each>
  __device__ void add(int stage, bool whole, const Inside& inside, const Each& each) const {
    const int64_t extent = p.D * Target<Real>::pitch(p.D);
    Real* const share = p.partial ? static_cast<Real*>(p.partial) + blockIdx.y * extent : nullptr;
    const Target<Real> acc{p.acc, p.scale, p.D, share, p.flag};
    acc.template add<kOwned, kAhead>(stage - begin >= kFlushRows / kRows, whole, inside, each);
  }
  template <int kOwned, typename Each>
  __device__ void add_products(int stage, const Each& each) const {
    const int I = static_cast<int>(p.x.width);
    const bool whole = i0 + Tile::kTileO <= min(I, j0 + 1) && j0 + Tile::kTileI <= I;
    add<kOwned, kFewRegisters>(stage, whole, [&](int i, int j) { return i <= j && j < I; }, each);
  }
  __device__ void add_sum(int stage, int i, Real value) const {
    const int I = static_cast<int>(p.x.width), last = p.D - 1;
    add<1, 2>(stage, false, [&](int i, int) { return i < I; }, [&](const auto& visit) { visit(i, last, value); });
  }
  // One thread of the block: the corner, sum_m w_m.
  __device__ void add_count(double count) const {
    if (!corner) return;
    const int last = p.D - 1;
    const auto always = [](int, int) { return true; };
    add<1, 2>(begin, false, always, [&](const auto& visit) { visit(last, last, static_cast<Real>(count)); });
  }
};

}  // namespace fisherfast
