// SPDX-License-Identifier: Apache-2.0
// How the small kernels of small.cuh are launched.
#include <algorithm>

#include "cuda/common.cuh"
#include "cuda/small.cuh"

namespace fisherfast {

using namespace small;

namespace {

constexpr int kMaxBlocks = 2048;

dim3 grid_for(int64_t blocks) { return dim3(static_cast<unsigned>(std::min<int64_t>(blocks, kMaxBlocks))); }

}  // namespace

void check_offsets(const Device& device, const Samples& samples) {
  if (!samples.offsets || samples.N == 0) return;
  device.launch(check_offsets_kernel, grid_for(ceil_div(samples.N, kThreads)), kThreads, samples);
}

void raise_flag(const Device& device, const OptionalTensor& flag, const OptionalTensor& tensor) {
  if (!flag || !tensor || tensor->numel() == 0) return;
  dispatch_input("raise_flag", tensor->scalar_type(), [&](auto type) {
    using In = typename decltype(type)::type;
    int64_t sizes[3], strides[3];
    for (int64_t axis = 0; axis < tensor->dim(); ++axis) {
      sizes[axis] = tensor->size(axis);
      strides[axis] = tensor->stride(axis);
    }
    const auto* data = static_cast<const In*>(tensor->const_data_ptr());
    const FlagParams<In> params = flag_params(data, tensor->dim(), sizes, strides, data_or_null<int32_t>(flag));
    constexpr int kOfBlock = 4 * kThreads * Vector<In>::kWidth;  // elements: four loads a thread, all under way at once
    const int64_t across = std::min<int64_t>(ceil_div(params.sizes[2], kOfBlock), kMaxBlocks);
    const int64_t down = std::clamp<int64_t>(kMaxBlocks / across, 1, params.sizes[0] * params.sizes[1]);
    device.launch(raise_flag_kernel<In>, dim3(across, down), kThreads, params);
  });
}

template <typename Real>
void add_partials(const Device& device, const Partials<Real>& params) {
  const int64_t across = ceil_div(params.columns, kThreads / params.groups());
  const int64_t down = std::clamp<int64_t>(kMaxBlocks / across, 1, params.rows);
  device.launch(add_partials_kernel<Real>, dim3(across, down), kThreads, params);
}
template void add_partials<float>(const Device&, const Partials<float>&);
template void add_partials<double>(const Device&, const Partials<double>&);

void add_norms(const Device& device, const NormPartials& params) {
  if (params.N > 0) device.launch(add_norms_kernel, dim3(params.N), kThreads, params);
}

}  // namespace fisherfast
