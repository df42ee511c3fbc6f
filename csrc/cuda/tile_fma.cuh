// SPDX-License-Identifier: Apache-2.0
// A block's tile of left^T right by fused multiply-adds in float32 or float64, for any strides: shared memory is filled through
// registers, one buffer while the other is multiplied.
#pragma once

#include "cuda/device.cuh"

namespace fisherfast {

// The tile [kTileO, kTileI] of a square of threads, each with kMicroO x kMicroI elements; half as many along a side in float64.
template <typename In_, int kMostI>
struct FmaTile {
  using In = In_;
  using Real = compute_t<In>;
  static constexpr bool kDouble = std::is_same_v<Real, double>;
  static constexpr int kSide = 16, kThreads = kSide * kSide, kRows = 8;
  static constexpr int kMicroO = kDouble ? 4 : 8, kMicroI = kDouble ? 4 : kMostI;
  static constexpr int kTileO = kSide * kMicroO, kTileI = kSide * kMicroI;
  static constexpr int kPack = 16 / sizeof(Real);  // elements of one shared memory access
  // The elements a thread owns along one side: packs of kPack, kSide packs apart, so that a warp reads without bank conflicts.
  static __device__ int owned(int thread, int element) { return (element / kPack * kSide + thread) * kPack + element % kPack; }
  template <typename Visit>
  static __device__ void for_each_owned(Visit visit) {
#pragma unroll
    for (int o = 0; o < kMicroO; ++o)
#pragma unroll
      for (int i = 0; i < kMicroI; ++i) visit(o, i);
  }
  static_assert(kThreads % kTileO == 0 && kThreads % kTileI == 0, "a thread loads one feature");
  static_assert(kRows * kTileO % kThreads == 0 && kRows * kTileI % kThreads == 0, "whole loads");
  static_assert(2 * kRows * (kTileO + kTileI) * sizeof(Real) <= 47 * 1024, "two buffers in static shared memory");
};

// One thread's part of a [kRows, kTile] tile on its way from global to shared memory: a feature, every kStep-th row.
// The raw elements wait in registers while the block multiplies; only put() looks at them. With kScaled it squares them, if
// asked, and multiplies them by the weights of their rows.
template <typename Tile, int kTile, bool kScaled>
struct Prefetch {
  using In = typename Tile::In;
  using Real = typename Tile::Real;
  static constexpr int kStep = Tile::kThreads / kTile, kCount = Tile::kRows / kStep;
  In values[kCount];
  float weights[kCount];

  __device__ void get(const Rows<In>& rows, const In* first, const float* weight, int count, int feature) {
    const int f = feature + threadIdx.x % kTile;
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      const int t = threadIdx.x / kTile + j * kStep;
      const bool inside = t < count && f < rows.width;
      values[j] = inside ? first[t * rows.stride_t + f * rows.stride_d] : In{};
      if (kScaled) weights[j] = inside && weight ? weight[t] : 1.0f;
    }
  }
  __device__ void put(Real (&shared)[Tile::kRows][kTile], bool squared) const {
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      Real value = static_cast<Real>(values[j]);
      if (kScaled) value *= (squared ? value : Real(1)) * weights[j];
      shared[threadIdx.x / kTile + j * kStep][threadIdx.x % kTile] = value;
    }
  }
};

template <typename Real, int kPack>
struct __align__(16) Pack {
  Real values[kPack];
};

template <typename Tile, typename Real, int kMicro, int kTile>
__device__ void read_fragment(Real (&fragment)[kMicro], const Real (&row)[kTile], int thread) {
  using P = Pack<Real, Tile::kPack>;
#pragma unroll
  for (int e = 0; e < kMicro; e += Tile::kPack) {
    const P pack = *reinterpret_cast<const P*>(row + Tile::owned(thread, e));
#pragma unroll
    for (int j = 0; j < Tile::kPack; ++j) fragment[e + j] = pack.values[j];
  }
}

}  // namespace fisherfast
