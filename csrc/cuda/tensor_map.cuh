// SPDX-License-Identifier: Apache-2.0
// What the bulk copy engine is told of a tensor.
#pragma once

#include <cudaTypedefs.h>

#include <algorithm>

#include "cuda/common.cuh"
#include "cuda/tile_wgmma.cuh"

namespace fisherfast {

// Rows [N, T, width] of 16-bit elements that lie in vectors (see in_vectors), and boxes of `rows` rows of one sample.
template <typename In>
TensorMap tensor_map(const Rows<In>& x, int64_t N, int64_t T, int rows) {
  static const auto encode = [] {  // of the driver's library, which the extension does not link
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found{};
    STD_CUDA_CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found));
    STD_TORCH_CHECK(found == cudaDriverEntryPointSuccess, "the driver has no cuTensorMapEncodeTiled; update it to 12.0 or newer");
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
  }();
  constexpr bool kBFloat16 = std::is_same_v<In, BFloat16>;
  const BoxedRows boxed = boxed_rows(x, N, T, rows);
  cuuint64_t sizes[3], strides[2];
  cuuint32_t box[3];
  const cuuint32_t every[3] = {1, 1, 1};
  std::copy_n(boxed.sizes, 3, sizes);
  std::transform(boxed.strides, boxed.strides + 2, strides, [](int64_t stride) { return static_cast<cuuint64_t>(2 * stride); });
  std::copy_n(boxed.box, 3, box);
  TensorMap map{{}, boxed.t_outside};
  const CUresult result =
      encode(&map.map, kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 3, const_cast<In*>(x.data),
             sizes, strides, box, every, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  STD_TORCH_CHECK(result == CUDA_SUCCESS, "cuTensorMapEncodeTiled: refused [", N, ", ", T, ", ", x.width, "] with strides (",
                  x.stride_n, ", ", x.stride_t, ", 1), error ", static_cast<int>(result));
  return map;
}

}  // namespace fisherfast
