// SPDX-License-Identifier: Apache-2.0
// The kernel of kron_log1p_sum: acc[0] += sum_ij log(1 + c a_i b_j), acc[1] += sum_ij g(c a_i b_j), g(s) = log(1+s) - s/(1+s).
//
// A thread keeps kLane columns of b in registers and walks the rows of its block's share; the products exist nowhere else. Every
// block hands over two sums, which are added in a fixed order: no atomics.
//
// Floor: I O divisions and some 30 I O other operations in float64; bytes: a few reads of a and b.
#pragma once

#include "cuda/device.cuh"

namespace fisherfast {
namespace kron {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kLane = 4, kColumns = kLane * kThreads;  // columns of a thread, kThreads apart; of a block
constexpr int64_t kBlocks = 1024;                      // a few on each multiprocessor of a large GPU

template <typename A, typename B>
struct KronParams {
  const A* a;
  const B* b;
  int64_t rows, columns, stride_a, stride_b;
  int64_t share;  // rows of a block
  double c;
  double* partial;  // [2, blocks]
};

struct Sums {
  double log = 0, cost = 0;
  int64_t exponent = 0;

  // With 1 + s = 2^k (1 + v), sqrt(1/2) <= 1 + v < sqrt(2), and z = v / (2 + v): log(1 + v) = 2 atanh(z). For small s, k is 0
  // and v is s, and all terms are positive: nothing cancels. NaN unless 0 < 1 + s < 6e307. csrc/cpu/log1p_sum_kernel.h has the
  // same in vectors.
  __device__ void add(double s) {
    constexpr int64_t kOne = int64_t{1023} << 52, kExponent = ~((int64_t{1} << 52) - 1), kSqrtHalf = 0x3fe6a09e667f3bcd;
    constexpr int kTerms = 9;  // the next one is 2e-17 of the sum
    const int64_t sum = __double_as_longlong(1.0 + s), rounded = sum + (kOne - kSqrtHalf);
    const double power = __longlong_as_double(2 * kOne - (rounded & kExponent));  // 2^-k
    const double v = sum > 0 ? s * power + (power - 1.0) : __longlong_as_double(-1);
    const double w = 1.0 / ((1.0 + v) * (2.0 + v));
    const double z = v * (1.0 + v) * w, r = (2.0 + v) * w, square = z * z;
    double series = 2.0 / (2 * kTerms + 1);
#pragma unroll
    for (int n = kTerms - 1; n >= 1; --n) series = series * square + 2.0 / (2 * n + 1);
    const double tail = z * square * series;
    log += 2.0 * z + tail;
    cost += (z * v * r + tail) - r * (1.0 - power);
    exponent += (rounded >> 52) - 1023;
  }
};

template <typename A, typename B>
__global__ void __launch_bounds__(kThreads) kron_sums_kernel(const __grid_constant__ KronParams<A, B> p) {
  double values[kLane];  // zero past the last column, which adds nothing
#pragma unroll
  for (int k = 0; k < kLane; ++k) {
    const int64_t column = static_cast<int64_t>(blockIdx.x) * kColumns + k * kThreads + threadIdx.x;
    values[k] = column < p.columns ? static_cast<double>(p.b[column * p.stride_b]) : 0.0;
  }
  Sums sums;
  const int64_t begin = blockIdx.y * p.share, end = min(begin + p.share, p.rows);
  for (int64_t row = begin; row < end; ++row) {
    const double factor = p.c * static_cast<double>(p.a[row * p.stride_a]);
#pragma unroll
    for (int k = 0; k < kLane; ++k) sums.add(factor * values[k]);
  }
  constexpr double kLog2 = 0.693147180559945309;
  const double whole = kLog2 * static_cast<double>(sums.exponent);
  const double log = warp_sum(whole + sums.log), cost = warp_sum(whole + sums.cost);
  __shared__ double logs[kWarps], costs[kWarps];
  if (threadIdx.x % 32 == 0) {
    logs[threadIdx.x / 32] = log;
    costs[threadIdx.x / 32] = cost;
  }
  __syncthreads();
  if (threadIdx.x < 2) {
    const double* warps = threadIdx.x == 0 ? logs : costs;
    double total = 0;
    for (int w = 0; w < kWarps; ++w) total += warps[w];
    const int64_t blocks = static_cast<int64_t>(gridDim.x) * gridDim.y;
    p.partial[threadIdx.x * blocks + blockIdx.y * gridDim.x + blockIdx.x] = total;
  }
}

}  // namespace kron
}  // namespace fisherfast
