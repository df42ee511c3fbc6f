// SPDX-License-Identifier: Apache-2.0
// The small kernels around the ops: input checks that need no host synchronisation, and sums of partial results in a fixed order.
// All are bound by memory: each reads its input once.
#pragma once

#undef NDEBUG  // device assertions are part of the ops' contract

#include <cassert>

#include "cuda/partials.cuh"

namespace fisherfast {
namespace small {

constexpr int kThreads = 256;

template <typename In>
struct FlagParams {
  const In* data;
  int64_t sizes[2], width;  // rows [sizes[0], sizes[1]] of width elements
  int64_t strides[3];
  int32_t* flag;
};

// 16 bytes of a row.
template <typename In>
struct alignas(16) Vector {
  static constexpr int kWidth = 16 / sizeof(In);
  In values[kWidth];
};

// Whether every row begins at a multiple of 16 bytes, and its elements follow one another.
template <typename In>
FISHERFAST_HD bool in_whole_vectors(const FlagParams<In>& p) {
  constexpr int kWidth = Vector<In>::kWidth;
  return p.strides[2] == 1 && p.strides[0] % kWidth == 0 && p.strides[1] % kWidth == 0 &&
         reinterpret_cast<uintptr_t>(p.data) % 16 == 0;
}

// One block per row, grid-strided. Blocks that see a bad value all store the same 1.
template <typename In>
__global__ void __launch_bounds__(kThreads) raise_flag_kernel(const __grid_constant__ FlagParams<In> p) {
  constexpr int kWidth = Vector<In>::kWidth;
  const auto is_bad = [](In value) { return !isfinite(static_cast<compute_t<In>>(value)); };
  const int64_t vectors = in_whole_vectors(p) ? p.width / kWidth : 0;
  bool bad = false;
  for (int64_t row = blockIdx.x; row < p.sizes[0] * p.sizes[1]; row += gridDim.x) {
    const In* values = p.data + row / p.sizes[1] * p.strides[0] + row % p.sizes[1] * p.strides[1];
    for (int64_t v = threadIdx.x; v < vectors; v += kThreads) {
      const Vector<In> vector = reinterpret_cast<const Vector<In>*>(values)[v];
#pragma unroll
      for (int e = 0; e < kWidth; ++e) bad |= is_bad(vector.values[e]);
    }
    for (int64_t d = vectors * kWidth + threadIdx.x; d < p.width; d += kThreads) bad |= is_bad(values[d * p.strides[2]]);
  }
  if (bad) *p.flag = 1;
}

static __global__ void __launch_bounds__(kThreads) check_offsets_kernel(const __grid_constant__ Samples samples) {
  const int64_t* offsets = samples.offsets;
  for (int64_t n = blockIdx.x * kThreads + threadIdx.x; n < samples.N; n += gridDim.x * kThreads) {
    assert(offsets[n] <= offsets[n + 1] && "offsets must rise");
    assert((n > 0 || offsets[0] == 0) && "offsets must start at 0");
    assert((n < samples.N - 1 || offsets[samples.N] == samples.M) && "offsets must end at M");
  }
}

template <typename Real>
__global__ void __launch_bounds__(kThreads) add_partials_kernel(const __grid_constant__ Partials<Real> p) {
  if (p.flag && *p.flag) return;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t e = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; e < p.count; e += step) {
    if (p.side && e / p.side > e % p.side) continue;
    double sum = 0;
    for (int s = 0; s < p.splits; ++s) sum += p.data[s * p.stride + e];
    p.output.add(e, p.scale * sum);
  }
}

static __global__ void __launch_bounds__(kThreads) add_norms_kernel(const __grid_constant__ NormPartials p) {
  if (p.flag && *p.flag) return;
  const int n = blockIdx.x;
  const int64_t begin = p.width * (p.offsets ? p.offsets[n] : n);
  const int64_t end = p.width * (p.offsets ? p.offsets[n + 1] : n + 1);
  double sum = 0;
  for (int64_t e = begin + threadIdx.x; e < end; e += kThreads) sum += p.data[e];
  __shared__ double warps[kThreads / 32];
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int w = 1; w < kThreads / 32; ++w) sum += warps[w];
    p.sqnorm.add(n, sum);
  }
}

}  // namespace small
}  // namespace fisherfast
