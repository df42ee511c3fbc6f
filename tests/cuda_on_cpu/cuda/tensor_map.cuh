// SPDX-License-Identifier: Apache-2.0
// In the place of csrc/cuda/tensor_map.cuh: what the driver demands of a tensor is demanded here.
#pragma once

#include "common.h"
#include "cuda/tile_wgmma.cuh"

namespace fisherfast {

template <typename In>
TensorMap tensor_map(const Rows<In>& x, int64_t N, int64_t T, int rows) {
  const BoxedRows boxed = boxed_rows(x, N, T, rows);
  require(reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && x.stride_d == 1, "tensor map: address");
  require(boxed.strides[0] % 8 == 0 && boxed.strides[1] % 8 == 0, "tensor map: strides");
  require(boxed.strides[0] > 0 && boxed.strides[0] <= boxed.strides[1], "tensor map: strides rise");
  require(rows >= 1 && rows <= 256, "tensor map: box");
  const auto& [sizes, strides, box, t_outside] = boxed;
  return {reinterpret_cast<const uint16_t*>(x.data),
          {sizes[0], sizes[1], sizes[2]},
          {strides[0], strides[1]},
          {box[0], box[1], box[2]},
          t_outside};
}

}  // namespace fisherfast
