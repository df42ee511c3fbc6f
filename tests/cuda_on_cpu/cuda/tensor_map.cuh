// SPDX-License-Identifier: Apache-2.0
// In the place of csrc/cuda/tensor_map.cuh: what the driver demands of a tensor is demanded here.
#pragma once

#include "common.h"
#include "cuda/wgmma.cuh"

namespace fisherfast {

template <typename In>
TensorMap tensor_map(const Rows<In>& x, int64_t N, int64_t T, int rows) {
  require(reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && x.stride_d == 1, "tensor map: address");
  require(T == 1 || x.stride_t % 8 == 0, "tensor map: stride of rows");
  require(N == 1 || x.stride_n % 8 == 0, "tensor map: stride of samples");
  require(rows >= 1 && rows <= 256, "tensor map: box");
  return {reinterpret_cast<const uint16_t*>(x.data), {x.width, T, N}, {x.stride_t, x.stride_n}, rows};
}

}  // namespace fisherfast
