// SPDX-License-Identifier: Apache-2.0
// What the bulk copy engine is told of a tensor.
#pragma once

#include <cudaTypedefs.h>

#include "cuda/common.cuh"

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
  const auto extent = [](int64_t size) { return static_cast<cuuint64_t>(size); };
  // The stride of an axis of one element is never used, but must be valid.
  const auto bytes = [](int64_t size, int64_t stride) { return static_cast<cuuint64_t>(size > 1 ? 2 * stride : 16); };
  const cuuint64_t sizes[3] = {extent(x.width), extent(T), extent(N)}, strides[2] = {bytes(T, x.stride_t), bytes(N, x.stride_n)};
  const cuuint32_t box[3] = {kBoxFeatures, static_cast<cuuint32_t>(rows), 1}, every[3] = {1, 1, 1};
  TensorMap map;
  const CUresult result =
      encode(&map, kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 3, const_cast<In*>(x.data),
             sizes, strides, box, every, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  STD_TORCH_CHECK(result == CUDA_SUCCESS, "cuTensorMapEncodeTiled: refused [", N, ", ", T, ", ", x.width, "] with strides (",
                  x.stride_n, ", ", x.stride_t, ", 1), error ", static_cast<int>(result));
  return map;
}

}  // namespace fisherfast
