// SPDX-License-Identifier: Apache-2.0
// A block's tile of left^T right for 16-bit inputs on Hopper: one warpgroup has boxes of rows copied into shared memory, a ring
// of stages ahead; two others multiply what has arrived, each its half of the tile's rows.
#pragma once

#include "cuda/device.cuh"
#include "cuda/plan.h"
#include "cuda/wgmma.cuh"

namespace fisherfast {

// The tile [128, kTileI] and the stages of kRows rows in front of it.
//
// Registers: 65,536 for 384 threads are 168 each at the launch; the copying warpgroup gives back all but 24, and the multiplying
// ones take 240. A product of 64 x kTileI takes kTileI / 2 of them: 96 for it and 96 for a sum beside it leave 48 at kTileI =
// 192; 3 x 64 leave as many at 128. At 256, 128 + 128 are more than there are. Clocks for a row, at kTileI = 128 | 192: products
// 8 | 12 (2,048 multiply-adds a clock and multiprocessor); shared memory 10 | 13 (128 bytes a clock: each warpgroup reads 2 (64 +
// kTileI) bytes, the copies write 2 (128 + kTileI)). L2: see choose_width.
template <typename In_, int kTileI_>
struct WgmmaTile {
  using In = In_;
  static constexpr int kTileO = 128, kTileI = kTileI_, kRows = 64;
  static constexpr int kMultipliers = kTileO / 64,
                       kThreads = (kMultipliers + 1) * kWarpgroup;  // the copying warpgroup is the last
  static constexpr int kCopyRegisters = 24, kMultiplyRegisters = 240;
  static constexpr int kOwned = kTileI / 2;          // elements of the tile a thread owns
  static constexpr int kBox = kRows * kBoxFeatures;  // elements
  static constexpr int kStage = kRows * (kTileO + kTileI);
  static constexpr int kStages = 200 * 1024 / (2 * kStage);
  static_assert(sizeof(In) == 2, "products take 16-bit elements");
  static_assert(kTileI % kBoxFeatures == 0, "whole boxes");

  // visit(row, column, e) for what a thread owns: element e of c lies there in the tile.
  template <typename Visit>
  static __device__ void for_each_owned(Visit visit) {
    const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4, column = lane % 4 * 2;
#pragma unroll
    for (int e = 0; e < kOwned; ++e) visit(row + e / 2 % 2 * 8, column + e / 4 * 8 + e % 2, e);
  }
};

template <typename Tile>
TileGrid tiles_of(int64_t O, int64_t I) {
  return {static_cast<int>(ceil_div(O, Tile::kTileO)), static_cast<int>(ceil_div(I, Tile::kTileI))};
}

// Whether the copy engine can take boxes out of N samples of T rows: 16 bytes at a time, from places that differ.
template <typename In>
bool in_boxes(const Rows<In>& rows, int64_t N, int64_t T) {
  return in_vectors(rows, N, T) && (T <= 1 || rows.stride_t > 0) && (N <= 1 || rows.stride_n > 0);
}

// What the copy engine is told of them: axes from the last one on, the outer two ordered by their strides, as it wants them.
struct BoxedRows {
  int64_t sizes[3], strides[2];
  int box[3];  // `rows` rows of one sample
  bool t_outside;
};
template <typename In>
BoxedRows boxed_rows(const Rows<In>& x, int64_t N, int64_t T, int rows) {
  const int64_t least = ceil_div(x.width, kVector) * kVector;  // for an axis of one element, whose stride is never used
  const int64_t stride_t = T > 1 ? x.stride_t : least, stride_n = N > 1 ? x.stride_n : stride_t * T;
  if (N > 1 && T > 1 && stride_t > stride_n) return {{x.width, N, T}, {stride_n, stride_t}, {kBoxFeatures, 1, rows}, true};
  return {{x.width, T, N}, {stride_t, stride_n}, {kBoxFeatures, rows, 1}, false};
}

// A position in the ring of stages, and the parity of the phase that its barriers are in.
template <int kStages>
struct Ring {
  int stage = 0;
  uint32_t parity = 0;

  __device__ void next() {
    if (++stage < kStages) return;
    stage = 0;
    parity ^= 1;
  }
  __device__ int before() const { return stage == 0 ? kStages - 1 : stage - 1; }
};

// The stages in shared memory: boxes of the left operand, then boxes of the right, [features / 64][kRows][64].
template <typename Tile>
struct Stages {
  uint16_t boxes[Tile::kStages][Tile::kStage];
  Barrier full[Tile::kStages];   // the boxes have arrived
  Barrier empty[Tile::kStages];  // every warpgroup of the cluster that reads them has

  static constexpr int bytes() { return static_cast<int>(sizeof(Stages)) + 1023; }  // wherever it may begin
  static __device__ Stages& here() { return *reinterpret_cast<Stages*>(shared_boxes()); }

  // All threads of the cluster pass here before anything else.
  __device__ void init(const TensorMap& left, const TensorMap& right) {
    if (threadIdx.x == 0) {
      prefetch_map(left);
      prefetch_map(right);
      for (int stage = 0; stage < Tile::kStages; ++stage) {
        full[stage].init(1);
        empty[stage].init(Tile::kMultipliers * cluster_size());
      }
      fence_barrier_init();
    }
    cluster_arrive();
    cluster_wait();
  }

  // One thread: has the rows from (n, t) on copied. The blocks of a cluster have the right operand in common: each copies its
  // share of the rows, to all of them.
  __device__ void load(Ring<Tile::kStages> ring, const TensorMap& left, int left_feature, const TensorMap& right,
                       int right_feature, int t, int n) {
    uint16_t* box = boxes[ring.stage];
    Barrier& barrier = full[ring.stage];
    empty[ring.stage].wait(ring.parity ^ 1);
    barrier.expect(2 * Tile::kStage);
    for (int f = 0; f < Tile::kTileO; f += kBoxFeatures, box += Tile::kBox) load_box(box, left, barrier, left_feature + f, t, n);
    const int blocks = cluster_size(), first = cluster_rank() * (Tile::kRows / blocks);
    box += first * kBoxFeatures;
    for (int f = 0; f < Tile::kTileI; f += kBoxFeatures, box += Tile::kBox) {
      if (blocks == 1) {
        load_box(box, right, barrier, right_feature + f, t, n);
      } else {
        load_box(box, right, barrier, right_feature + f, t + first, n, (1 << blocks) - 1);
      }
    }
  }

  // A multiplying warpgroup: begins c += left^T right over its first rows; with kStart, c = left^T right.
  template <bool kStart>
  __device__ void multiply(float (&c)[Tile::kOwned], Ring<Tile::kStages> ring, int rows) {
    switch ((rows + 15) / 16) {  // a branch between two products would end the group after each
      case 1:
        return multiply_steps<kStart, 1>(c, ring.stage);
      case 2:
        return multiply_steps<kStart, 2>(c, ring.stage);
      case 3:
        return multiply_steps<kStart, 3>(c, ring.stage);
      default:
        return multiply_steps<kStart, 4>(c, ring.stage);
    }
  }

  // The multiplying warpgroups: fill the rows from `row` to the next multiple of 16, of both operands, with zeros.
  __device__ void clear(int stage, int row) {
    constexpr int kVectors = kBoxFeatures * 2 / 16, kBoxes = Tile::kStage / Tile::kBox;  // of a row; of a stage
    const int count = (16 - row % 16) * kVectors;
    for (int v = threadIdx.x; v < kBoxes * count; v += Tile::kMultipliers * kWarpgroup) {
      uint16_t* const first = boxes[stage] + v / count * Tile::kBox + row * kBoxFeatures;
      reinterpret_cast<uint4*>(first)[v % count] = make_uint4(0, 0, 0, 0);
    }
    fence_async_proxy();
    named_sync(1, Tile::kMultipliers * kWarpgroup);
  }

  // A multiplying warpgroup: waits until at most kPending of its stages are being multiplied, the one given not among them, and
  // tells all who copy into it.
  template <int kPending>
  __device__ void release_after(int stage) {
    wgmma_wait<kPending>();
    const int thread = threadIdx.x % kWarpgroup;
    if (thread < cluster_size()) empty[stage].arrive_at(thread);
  }

 private:
  template <bool kStart, int kSteps>
  __device__ void multiply_steps(float (&c)[Tile::kOwned], int stage) const {
    static_assert(16 * kSteps <= Tile::kRows, "a stage has no more rows");
    const uint16_t *const left = boxes[stage] + threadIdx.x / kWarpgroup * Tile::kBox, *const right =
                                                                                           boxes[stage] +
                                                                                           Tile::kMultipliers * Tile::kBox;
    const uint64_t a = operand(left, 0), b = operand(right, 2 * Tile::kBox);
    wgmma_fence();
    wgmma<typename Tile::In, Tile::kOwned, kStart>(c, a, b);
#pragma unroll
    for (int step = 1; step < kSteps; ++step)
      wgmma<typename Tile::In, Tile::kOwned, false>(c, a + step * kNextRows, b + step * kNextRows);
    wgmma_commit();
  }
};

}  // namespace fisherfast
