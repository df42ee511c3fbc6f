// SPDX-License-Identifier: Apache-2.0
// What the kernels of linear_sq share: their parameters, how a block walks the samples, where a tile goes.
//
//   acc[o,i] += scale * sum_n w_n c_n[o,i]^2,  c_n[o,i] = sum_t g[n,t,o] x[n,t,i]
//
// One block owns a [kTileO, kTileI] tile of the result. It walks samples and, within each, rows t; c_n and the sum of
// squares live in registers and nothing of size [N, O, I] exists. grid = (tiles of I, tiles of O, splits of the samples).
//
// Floor: 2 M O I FLOPs (M = N T rows); bytes: x and g once, acc read and written once. As tiled, x is read O / kTileO times
// and g I / kTileI times, mostly from L2: 2 kTileO kTileI / (kTileO + kTileI) FLOPs for each element loaded, 128 at 128x128.
#pragma once

#include "cuda/device.cuh"

namespace fisherfast {

template <typename In>
struct LinearSqParams {
  Samples samples;
  Rows<In> x, g;
  const float* weight;
  const int32_t* flag;
  Factor scale;
  Output acc, total;
  void* partial;  // Real [splits, outputs, O, pitch(I)], or null for one split, which adds to acc and total itself
  bool zeroed;    // partial is zeros, as splits of packed samples need it, which may hold no rows
  double* norms;  // [N, tiles]: every tile's share of |c_n|^2, or null
  int samples_per_split;
  bool squared;  // pooled kernel only: multiply squares of x and g, not their values
};

// A block adds its tile to the outputs after this many samples: the float sums of squares stay short, hence accurate.
constexpr int kSamplesPerFlush = 64;

// Packed samples are one where only rows count.
inline Samples joined(const Samples& samples) { return samples.offsets ? Samples{1, samples.M, samples.M, nullptr} : samples; }

// The position of a block in its samples: at most kRows rows, from row t of sample n on.
template <int kRows>
struct Walk {
  int n, n_end, t, count;

  __device__ Walk(const Samples& samples, int samples_per_split) : t(0), count(0) {
    n = blockIdx.z * samples_per_split;
    n_end = static_cast<int>(min(static_cast<int64_t>(n) + samples_per_split, samples.N));
    enter(samples);
  }
  __device__ bool valid() const { return n < n_end; }
  __device__ int rows() const { return min(kRows, count - t); }
  __device__ bool ends_sample() const { return t + kRows >= count; }
  __device__ void next(const Samples& samples) {
    t += kRows;
    if (t < count) return;
    ++n;
    enter(samples);
  }

 private:
  __device__ void enter(const Samples& samples) {  // the first row of sample n or, where it is empty, of the next that is not
    t = 0;
    while (n < n_end && (count = static_cast<int>(min(samples.rows(n), samples.M - n * samples.T))) == 0) ++n;
  }
};

// A block's tile, and where its sums go.
template <typename Traits>
struct LinearSqBlock {
  using In = typename Traits::In;
  using Real = compute_t<In>;
  const LinearSqParams<In>& p;
  int o0, i0;  // of the tile

  __device__ LinearSqBlock(const LinearSqParams<In>& params, int row, int column)
      : p(params), o0(row * Traits::kTileO), i0(column * Traits::kTileI) {}

  // Adds a thread's kOwned elements of squares and, with kTotal, of totals to the outputs, or to what add_partials will add to
  // them, and starts both again. each(visit) calls visit(o, i, square, total). `samples`: how many the block has walked.
  template <int kOwned, int kAhead = kFewRegisters, typename Each>
  __device__ void emit(int samples, const Each& each) const {
    const int64_t O = p.g.width, I = p.x.width, extent = O * Target<Real>::pitch(I);
    const bool held = p.zeroed || samples > kSamplesPerFlush;
    const bool whole = o0 + Traits::kTileO <= O && i0 + Traits::kTileI <= I;
    const auto inside = [&](int o, int i) { return o < O && i < I; };
    Real* const share = p.partial ? static_cast<Real*>(p.partial) + blockIdx.z * (Traits::kTotal ? 2 : 1) * extent : nullptr;
    const Target<Real> acc{p.acc, p.scale, I, share, p.flag};
    acc.template add<kOwned, kAhead>(held, whole, inside, [&](const auto& visit) {
      each([&](int o, int i, Real& square, Real&) { visit(o, i, square); });
    });
    if constexpr (Traits::kTotal) {
      const Target<Real> total{p.total, 1.0, I, share ? share + extent : nullptr, p.flag};
      total.template add<kOwned, kAhead>(held, whole, inside, [&](const auto& visit) {
        each([&](int o, int i, Real&, Real& total) { visit(o, i, total); });
      });
    }
    each([](int, int, Real& square, Real& total) { square = total = 0; });
  }
};

// Stores the block's share of |c_n|^2. Between two calls the block must pass a barrier.
template <int kThreads, typename In, typename Real>
__device__ void emit_norm(const LinearSqParams<In>& p, int n, Real sum) {
  __shared__ Real warps[kThreads / 32];
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int w = 1; w < kThreads / 32; ++w) sum += warps[w];
  const int64_t tiles = static_cast<int64_t>(gridDim.x) * gridDim.y;
  p.norms[n * tiles + blockIdx.y * gridDim.x + blockIdx.x] = sum;
}

}  // namespace fisherfast
