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

// The sum over the lanes of a warp, in lane 0; always in the same order.
template <typename Real>
__device__ Real warp_sum(Real value) {
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_down_sync(0xffffffffu, value, distance);
  return value;
}

}  // namespace fisherfast
