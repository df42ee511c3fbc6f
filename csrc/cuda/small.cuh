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
  int64_t sizes[3], strides[3];  // rows [sizes[0], sizes[1]] of sizes[2] elements
  int32_t* flag;
};

// The elements of a tensor of at most three axes in as few rows as hold them all: axes by falling strides, those whose elements
// follow on one another as one. A contiguous tensor is a single row.
template <typename In>
FlagParams<In> flag_params(const In* data, int64_t axes, const int64_t* sizes, const int64_t* strides, int32_t* flag) {
  struct Axis {
    int64_t stride, size;
  } rows[3];
  int64_t count = 0;
  for (int64_t axis = 0; axis < axes; ++axis) {
    if (sizes[axis] <= 1 || strides[axis] == 0) continue;  // stride 0: the same elements again
    int64_t at = count++;
    for (; at > 0 && rows[at - 1].stride > strides[axis]; --at) rows[at] = rows[at - 1];
    rows[at] = {strides[axis], sizes[axis]};
  }
  FlagParams<In> p{data, {1, 1, 1}, {0, 0, 1}, flag};
  int to = 2;
  for (int64_t axis = 0; axis < count; ++axis) {
    if (axis > 0 && rows[axis].stride == p.sizes[to] * p.strides[to]) {
      p.sizes[to] *= rows[axis].size;
      continue;
    }
    if (axis > 0) --to;
    p.sizes[to] = rows[axis].size;
    p.strides[to] = rows[axis].stride;
  }
  return p;
}

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

// grid = (blocks that share a row, rows), as many as one likes. Blocks that see a bad value all store the same 1.
template <typename In>
__global__ void __launch_bounds__(kThreads) raise_flag_kernel(const __grid_constant__ FlagParams<In> p) {
  constexpr int kWidth = Vector<In>::kWidth;
  const auto is_bad = [](In value) { return !isfinite(static_cast<compute_t<In>>(value)); };
  const int64_t width = p.sizes[2], vectors = in_whole_vectors(p) ? width / kWidth : 0;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x,
                step = static_cast<int64_t>(gridDim.x) * kThreads;
  bool bad = false;
  for (int64_t row = blockIdx.y; row < p.sizes[0] * p.sizes[1]; row += gridDim.y) {
    const In* values = p.data + row / p.sizes[1] * p.strides[0] + row % p.sizes[1] * p.strides[1];
#pragma unroll 4
    for (int64_t v = first; v < vectors; v += step) {
      const Vector<In> vector = reinterpret_cast<const Vector<In>*>(values)[v];
#pragma unroll
      for (int e = 0; e < kWidth; ++e) bad |= is_bad(vector.values[e]);
    }
    for (int64_t d = vectors * kWidth + first; d < width; d += step) bad |= is_bad(values[d * p.strides[2]]);
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

// grid = (groups of columns, rows: as many as one likes). Of kThreads / groups() columns, each group takes every groups()-th
// partial sum, in order; then the groups' sums are added, in order.
template <typename Real>
__global__ void __launch_bounds__(kThreads, 6) add_partials_kernel(const __grid_constant__ Partials<Real> p) {
  __shared__ double sums[kThreads];
  const bool closed = is_up(p.flag);
  const int groups = p.groups(), lanes = kThreads / groups, group = threadIdx.x / lanes, lane = threadIdx.x % lanes;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * lanes + lane;
  for (int64_t row = blockIdx.y; row < p.rows; row += gridDim.y) {
    const bool mine = column < p.columns && (!p.upper || row <= column);
    const bool adds = mine && group == 0 && !closed;
    const int64_t element = row * p.columns + column;
    double sum = 0, before = adds ? p.output.at(element) : 0;  // on its way while the others are
    if (mine) {
      const Real* const partial = p.data + row * p.pitch + column;
#pragma unroll 4
      for (int64_t s = group; s < p.splits; s += groups) sum += partial[s * p.stride];
    }
    if (groups > 1) {
      sums[threadIdx.x] = sum;
      __syncthreads();
      if (group == 0)
        for (int g = 1; g < groups; ++g) sum += sums[g * lanes + lane];
      __syncthreads();
    }
    if (adds) p.output.put(element, before + p.scale * sum);
  }
}

static __global__ void __launch_bounds__(kThreads) add_norms_kernel(const __grid_constant__ NormPartials p) {
  const int n = blockIdx.x;
  const int64_t begin = p.width * (p.offsets ? p.offsets[n] : n);
  const int64_t end = p.width * (p.offsets ? p.offsets[n + 1] : n + 1);
  double sum = 0;
  for (int64_t e = begin + threadIdx.x; e < end; e += kThreads) sum += p.data[e];
  __shared__ double warps[kThreads / 32];
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0 && !is_up(p.flag)) {
    for (int w = 1; w < kThreads / 32; ++w) sum += warps[w];
    p.sqnorm.add(n, sum);
  }
}

}  // namespace small
}  // namespace fisherfast
