// SPDX-License-Identifier: Apache-2.0
// The small kernels around the ops: input checks that need no host synchronisation, and sums of partial results in a fixed
// order. All are bound by memory: each reads its input once.
#undef NDEBUG  // device assertions are part of the ops' contract

#include <algorithm>
#include <cassert>

#include "common.cuh"

namespace fisherfast {
namespace {

constexpr int kThreads = 256;
constexpr int kMaxBlocks = 2048;

template <typename In>
struct FlagParams {
  const In* data;
  int64_t sizes[2], width;  // rows [sizes[0], sizes[1]] of width elements
  int64_t strides[3];
  int32_t* flag;
};

// One block per row, grid-strided. Blocks that see a bad value all store the same 1.
template <typename In>
__global__ void __launch_bounds__(kThreads) raise_flag_kernel(const __grid_constant__ FlagParams<In> p) {
  bool bad = false;
  for (int64_t row = blockIdx.x; row < p.sizes[0] * p.sizes[1]; row += gridDim.x) {
    const In* values = p.data + row / p.sizes[1] * p.strides[0] + row % p.sizes[1] * p.strides[1];
    for (int64_t d = threadIdx.x; d < p.width; d += kThreads) {
      bad |= !isfinite(static_cast<compute_t<In>>(values[d * p.strides[2]]));
    }
  }
  if (bad) *p.flag = 1;
}

__global__ void __launch_bounds__(kThreads) check_offsets_kernel(const __grid_constant__ Samples samples) {
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

__global__ void __launch_bounds__(kThreads) add_norms_kernel(const __grid_constant__ NormPartials p) {
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
    FlagParams<In> params{static_cast<const In*>(tensor->const_data_ptr()), {1, 1}, 1, {0, 0, 0}, data_or_null<int32_t>(flag)};
    int64_t* const extents[3] = {&params.sizes[0], &params.sizes[1], &params.width};
    const int64_t axes = tensor->dim();
    for (int64_t axis = 0; axis < axes; ++axis) {
      *extents[3 - axes + axis] = tensor->size(axis);
      params.strides[3 - axes + axis] = tensor->stride(axis);
    }
    device.launch(raise_flag_kernel<In>, grid_for(params.sizes[0] * params.sizes[1]), kThreads, params);
  });
}

template <typename Real>
void add_partials(const Device& device, const Partials<Real>& params) {
  device.launch(add_partials_kernel<Real>, grid_for(ceil_div(params.count, kThreads)), kThreads, params);
}
template void add_partials<float>(const Device&, const Partials<float>&);
template void add_partials<double>(const Device&, const Partials<double>&);

void add_norms(const Device& device, const NormPartials& params) {
  if (params.N > 0) device.launch(add_norms_kernel, dim3(params.N), kThreads, params);
}

}  // namespace fisherfast
