// SPDX-License-Identifier: Apache-2.0
// A block's tile of left^T right for 16-bit inputs: rows wait in shared memory, tensor cores multiply them, sums are float.
#pragma once

#include "cuda/device.cuh"
#include "cuda/mma.cuh"

namespace fisherfast {

// The tile [kTileO, kTileI] of 8 warps, and the stages of kRows rows in front of it.
template <typename In_, int kTileO_>
struct MmaTile {
  using In = In_;
  static constexpr int kTileO = kTileO_, kTileI = 128, kRows = 32, kStages = 4;
  static constexpr int kWarpsO = 2, kWarpsI = 4, kThreads = 32 * kWarpsO * kWarpsI;
  static constexpr int kMmaO = kTileO / kWarpsO / 16, kMmaI = kTileI / kWarpsI / 8;  // products of a warp, 16 x 8 each
  static constexpr int kStage = kRows * (kTileO + kTileI);                           // elements
  static constexpr int kSharedBytes = kStages * kStage * 2;
  static_assert(sizeof(In) == 2, "the fragments hold 16-bit elements");
  static_assert(kTileO >= 64 && kTileI >= 64, "the swizzle permutes the 8 vectors of 64 features");
  static_assert(kMmaI % 2 == 0, "fragments of the right operand are loaded two at a time");
  static_assert(kRows % 16 == 0 && kRows * kTileO / 8 % kThreads == 0 && kRows * kTileI / 8 % kThreads == 0, "whole loads");
  static_assert(kSharedBytes <= 99 * 1024, "sm_86 and sm_89 give a block 99 KB");
  // visit(o, i, e) for what a thread owns: element e of product (o, i), at row o * 16 + e / 2 * 8, column i * 8 + e % 2 of the
  // warp's part, counted from (lane / 4, lane % 4 * 2).
  template <typename Visit>
  static __device__ void for_each_owned(Visit visit) {
#pragma unroll
    for (int o = 0; o < kMmaO; ++o)
#pragma unroll
      for (int i = 0; i < kMmaI; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e) visit(o, i, e);
  }
};

// Rows of kTile features lie in shared memory in vectors of 16 bytes, permuted within each row so that the same vector of 8
// consecutive rows, which one matrix load reads, lies in 8 different groups of banks.
template <int kTile>
__device__ int swizzled(int row, int vector) {
  return row * kTile + (vector ^ (row % 8)) * kVector;
}

// Copies features [feature, feature + kTile) of `count` rows from `first` on, and zeros in the place of what is not there.
template <typename Tile, int kTile>
__device__ void load_tile(uint16_t* shared, const Rows<typename Tile::In>& rows, bool aligned, const uint16_t* first, int count,
                          int feature) {
  for (int v = threadIdx.x; v < Tile::kRows * kTile / kVector; v += Tile::kThreads) {
    const int row = v / (kTile / kVector), vector = v % (kTile / kVector);
    const int f = feature + vector * kVector;
    const int valid = row < count ? max(0, min(kVector, static_cast<int>(rows.width) - f)) : 0;
    const uint16_t* source = valid ? first + row * rows.stride_t + f * rows.stride_d : first;
    uint16_t* target = shared + swizzled<kTile>(row, vector);
    if (aligned) {
      cp_async_16(target, source, valid * 2);
    } else {
      uint32_t pairs[kVector / 2];
      for (int e = 0; e < kVector; e += 2) {
        const uint32_t low = e < valid ? source[e * rows.stride_d] : 0;
        const uint32_t high = e + 1 < valid ? source[(e + 1) * rows.stride_d] : 0;
        pairs[e / 2] = low | high << 16;
      }
      *reinterpret_cast<uint4*>(target) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
    }
  }
}

// c += g^T x over the rows of one stage.
template <typename Tile>
__device__ void multiply_stage(float (&c)[Tile::kMmaO][Tile::kMmaI][4], const uint16_t* g, const uint16_t* x, int rows) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row = lane % 8, matrix = lane / 8;
  const int o_vector = warp / Tile::kWarpsI * Tile::kMmaO * 2 + matrix % 2;
  const int i_vector = warp % Tile::kWarpsI * Tile::kMmaI + matrix / 2;
#pragma unroll
  for (int t = 0; t < Tile::kRows; t += 16) {
    if (t >= rows) return;
    uint32_t a[Tile::kMmaO][4], b[Tile::kMmaI / 2][4];
#pragma unroll
    for (int o = 0; o < Tile::kMmaO; ++o)
      ldmatrix_x4_trans(a[o], g + swizzled<Tile::kTileO>(t + row + matrix / 2 * 8, o_vector + o * 2));
#pragma unroll
    for (int i = 0; i < Tile::kMmaI / 2; ++i)
      ldmatrix_x4_trans(b[i], x + swizzled<Tile::kTileI>(t + row + matrix % 2 * 8, i_vector + i * 2));
#pragma unroll
    for (int o = 0; o < Tile::kMmaO; ++o)
#pragma unroll
      for (int i = 0; i < Tile::kMmaI; ++i)
        mma_16816<typename Tile::In>(c[o][i], a[o], b[i / 2][i % 2 * 2], b[i / 2][i % 2 * 2 + 1]);
  }
}

}  // namespace fisherfast
