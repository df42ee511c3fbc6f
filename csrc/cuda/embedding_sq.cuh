// SPDX-License-Identifier: Apache-2.0
// The kernels of embedding_sq: acc[v,d] += scale * sum_n w_n (sum_{t: ids[n,t] = v} g[n,t,d])^2.
//
// Rows are sorted by (id, sample). In that order a token id is a run, owned by one block, and within it each sample is a run
// whose sum is squared when it ends: no atomics, one fixed order of sums.
//
// Floor: N T D additions; bytes: g once, and the rows of acc that occur read and written once. The sort moves 16 N T bytes a
// few times.
#pragma once

#undef NDEBUG  // device assertions are part of the op's contract

#include <cassert>

#include "cuda/device.cuh"

namespace fisherfast {
namespace runs {

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kLane = 4, kTile = 32 * kLane;  // features of a lane, 32 apart; features of a warp
constexpr int kSharedRun = 64;                // rows from which on the warps of a block share a run instead of a row

struct KeyParams {
  Samples samples;
  const int64_t* ids;
  int64_t stride_n, stride_t, V, padding_idx;
  int64_t* keys;  // [M]: id * N + n; V * N for rows that do not count
};

inline __device__ int64_t sample_of(const Samples& samples, int64_t row) {
  if (!samples.offsets) return row / samples.T;
  int64_t low = 0, high = samples.N;  // offsets[low] <= row < offsets[high]
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (samples.offsets[middle] <= row ? low : high) = middle;
  }
  return low;
}

static __global__ void __launch_bounds__(kThreads) keys_kernel(const __grid_constant__ KeyParams p) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; row < p.samples.M; row += step) {
    const int64_t n = sample_of(p.samples, row);
    const int64_t id = p.ids[p.samples.offsets ? row * p.stride_t : n * p.stride_n + row % p.samples.T * p.stride_t];
    assert(id >= 0 && id < p.V && "embedding_sq_: ids must lie in [0, V)");
    p.keys[row] = id == p.padding_idx ? p.V * p.samples.N : id * p.samples.N + n;
  }
}

template <typename In>
struct RunParams {
  Samples samples;
  Rows<In> g;
  const int64_t* keys;   // [M] sorted
  const int64_t* order;  // [M]: where each was before
  int64_t V;
  const float* weight;
  const int32_t* flag;
  double scale;
  Output acc, total;
  double* norms;  // [M, gridDim.y kWarps]: the share of |sample gradient|^2 of a run and a tile, at the run's first row; or null
};

// The end of the run of keys below `limit` that begins at `begin`, by doubling steps and bisection.
inline __device__ int64_t run_end(const int64_t* keys, int64_t begin, int64_t M, int64_t limit) {
  int64_t step = 1;
  while (begin + step < M && keys[begin + step] < limit) step *= 2;
  int64_t low = begin + step / 2, high = min(begin + step, M);  // keys[low] < limit <= keys[high]
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (keys[middle] < limit ? low : high) = middle;
  }
  return high;
}

// Kahan's sum: a frequent token occurs in thousands of samples, and a plain sum would lose more with each.
template <typename Real>
struct Compensated {
  Real sum, excess;

  __device__ void add(Real value) {
    const Real corrected = value - excess, next = sum + corrected;
    excess = (next - sum) - corrected;
    sum = next;
  }
};

template <typename Real>
struct Sums {
  Compensated<Real> square[kLane], total[kLane];
};

// One warp's part of an id's gradient over one tile: all samples whose run begins in [begin, end).
template <typename In>
__device__ Sums<compute_t<In>> sum_samples(const RunParams<In>& p, int64_t begin, int64_t end, int64_t run_stop, int64_t tile) {
  using Real = compute_t<In>;
  const int64_t feature = tile * kTile + threadIdx.x % 32;
  Sums<Real> sums{};
  for (int64_t row = begin; row < end;) {
    const int64_t key = p.keys[row], first_row = p.order[row];
    Real gradient[kLane] = {};
    for (; row < run_stop && p.keys[row] == key; ++row) {
      const int64_t source = p.order[row];
      const In* g = p.g.data + (p.samples.offsets ? source * p.g.stride_t
                                                  : source / p.samples.T * p.g.stride_n + source % p.samples.T * p.g.stride_t);
#pragma unroll
      for (int j = 0; j < kLane; ++j)
        if (feature + 32 * j < p.g.width) gradient[j] += static_cast<Real>(g[(feature + 32 * j) * p.g.stride_d]);
    }
    const Real w = p.weight ? p.weight[key % p.samples.N] : 1.0f;
    Real norm = 0;
#pragma unroll
    for (int j = 0; j < kLane; ++j) {
      const Real square = gradient[j] * gradient[j];
      sums.square[j].add(w * square);
      sums.total[j].add(w * gradient[j]);
      norm += square;
    }
    if (p.norms) {
      norm = warp_sum(norm);
      if (threadIdx.x % 32 == 0) p.norms[first_row * gridDim.y * kWarps + tile] = norm;
    }
  }
  return sums;
}

template <typename In, typename Real>
__device__ void emit(const RunParams<In>& p, int64_t id, int64_t tile, const Sums<Real>& sums) {
  if (is_up(p.flag)) return;
  for (int j = 0; j < kLane; ++j) {
    const int64_t feature = tile * kTile + threadIdx.x % 32 + 32 * j;
    if (feature >= p.g.width) return;
    p.acc.add(id * p.g.width + feature, p.scale * sums.square[j].sum);
    if (p.total.data) p.total.add(id * p.g.width + feature, sums.total[j].sum);
  }
}

// grid = (M, groups of kWarps tiles). The block at the first row of an id owns it, the others leave. A short run: each warp
// takes a tile and all rows. A long one: tile after tile, each warp takes the samples that begin in its share of the rows.
template <typename In>
__global__ void __launch_bounds__(kThreads) runs_kernel(const __grid_constant__ RunParams<In> p) {
  using Real = compute_t<In>;
  const int64_t begin = blockIdx.x, N = p.samples.N, id = p.keys[begin] / N;
  if (id == p.V || (begin > 0 && p.keys[begin - 1] / N == id)) return;
  const int64_t end = run_end(p.keys, begin, p.samples.M, (id + 1) * N);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t first_tile = static_cast<int64_t>(blockIdx.y) * kWarps;
  if (end - begin < kSharedRun) {
    const int64_t tile = first_tile + warp;
    if (tile * kTile < p.g.width) emit(p, id, tile, sum_samples(p, begin, end, end, tile));
    return;
  }
  __shared__ Sums<Real> shared[kWarps][32];
  int64_t from = begin + (end - begin) * warp / kWarps;
  const int64_t to = begin + (end - begin) * (warp + 1) / kWarps;
  while (from > begin && from < to && p.keys[from] == p.keys[from - 1]) ++from;
  for (int64_t tile = first_tile; tile < first_tile + kWarps && tile * kTile < p.g.width; ++tile) {
    shared[warp][lane] = sum_samples(p, from, to, end, tile);
    __syncthreads();
    if (warp == 0) {
      Sums<Real> sums = shared[0][lane];
      for (int w = 1; w < kWarps; ++w)
        for (int j = 0; j < kLane; ++j) {
          sums.square[j].add(shared[w][lane].square[j].sum);
          sums.total[j].add(shared[w][lane].total[j].sum);
        }
      emit(p, id, tile, sums);
    }
    __syncthreads();
  }
}

}  // namespace runs
}  // namespace fisherfast
