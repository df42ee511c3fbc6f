// SPDX-License-Identifier: Apache-2.0
// What the kernels share on the device.
#pragma once

#include "common.h"

namespace fisherfast {

// A float32 or float64 tensor that is added to, or none.
struct Output {
  void* data;
  bool is_double;

  __device__ void add(int64_t index, double value) const {
    if (is_double) {
      static_cast<double*>(data)[index] += value;
    } else {
      float* element = static_cast<float*>(data) + index;
      *element = static_cast<float>(*element + value);
    }
  }
};

// out[row * stride + column] += scale * value for a thread's kOwned elements, which each(visit) hands to visit(row, column,
// value), in the same order every time; those that are not inside(row, column) are left alone. Without `held` nothing was there
// yet. Loads run ahead of the additions, up to kAhead registers of them: by itself, each would wait for memory.
template <int kOwned, int kAhead, typename Out, typename Inside, typename Each>
__device__ void add_owned(Out* out, int64_t stride, double scale, bool held, const Inside& inside, const Each& each) {
  constexpr int kLoads = kAhead * sizeof(float) / sizeof(Out);
#pragma unroll
  for (int first = 0; first < kOwned; first += kLoads) {
    Out before[kLoads] = {};
    int k = 0;
    const auto ahead = [&] { return first <= k && k < first + kLoads; };
    if (held) {
      each([&](int row, int column, auto) {
        if (ahead() && inside(row, column)) before[k - first] = out[row * stride + column];
        ++k;
      });
    }
    k = 0;
    each([&](int row, int column, auto value) {
      if (ahead() && inside(row, column)) out[row * stride + column] = static_cast<Out>(before[k - first] + scale * value);
      ++k;
    });
  }
}

template <int kOwned, int kAhead, typename Inside, typename Each>
__device__ void add_owned(const Output& out, int64_t stride, double scale, const Inside& inside, const Each& each) {
  if (out.is_double) {
    add_owned<kOwned, kAhead>(static_cast<double*>(out.data), stride, scale, true, inside, each);
  } else {
    add_owned<kOwned, kAhead>(static_cast<float*>(out.data), stride, scale, true, inside, each);
  }
}

constexpr int kFewRegisters = 32;  // for loads ahead, where sums of several kinds fill the others

constexpr int kVector = 8;  // 16-bit elements of 16 bytes

// Whether rows can be copied 16 bytes at a time.
template <typename In>
bool in_vectors(const Rows<In>& rows) {
  return rows.width > 0 && rows.stride_d == 1 && rows.stride_t % kVector == 0 && rows.stride_n % kVector == 0 &&
         reinterpret_cast<uintptr_t>(rows.data) % 16 == 0;
}

// The sum over the lanes of a warp, in lane 0; always in the same order.
template <typename Real>
__device__ Real warp_sum(Real value) {
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_down_sync(0xffffffffu, value, distance);
  return value;
}

}  // namespace fisherfast
