// SPDX-License-Identifier: Apache-2.0
// What the CUDA ops share: how a kernel sees its tensors, how it is launched, and the small kernels around the large ones
// (defined in common.cu). Shapes, dtypes and devices were checked by the router before anything here runs.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include <cstdint>
#include <limits>

#include "cuda/device.cuh"
#include "cuda/partials.cuh"
#include "cuda/plan.h"

namespace fisherfast {

// Makes the tensor's device current while it lives, and launches on torch's current stream there.
class Device {
 public:
  explicit Device(const Tensor& tensor) : guard_(tensor.get_device_index()), index_(tensor.get_device_index()) {
    // The guard leaves alone what is current already, but an autograd thread has no context before its first call: the driver's
    // functions, which describe tensors to the copy engine, need one.
    STD_CUDA_CHECK(cudaSetDevice(index_));
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  int multiprocessors() const { return attribute(cudaDevAttrMultiProcessorCount); }

  // Can it run the kernels that need sm_90a, and does this build hold them?
  bool has_wgmma() const {
#ifdef FISHERFAST_SM90A
    return attribute(cudaDevAttrComputeCapabilityMajor) == 9;
#else
    return false;
#endif
  }

  // Every launch of the library: raises the shared memory limit where needed and reports what the launch reports. `cluster`
  // blocks that follow one another along x form a cluster.
  template <typename Params>
  void launch(void (*kernel)(Params), dim3 grid, int threads, const Params& params, int shared_bytes = 0, int cluster = 1) const {
    // Without the attribute dynamic and static shared memory have 48 KiB together; no kernel that asks for the former has half of
    // that static.
    constexpr int kSurelyShared = 24 * 1024;
    if (shared_bytes > kSurelyShared) {
      STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
    }
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream_;
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
    config.attrs = &attribute;
    config.numAttrs = cluster > 1 ? 1 : 0;
    STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, params));
  }

 private:
  int attribute(cudaDeviceAttr which) const {
    int value = 0;
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, index_));
    return value;
  }

  torch::stable::accelerator::DeviceGuard guard_;
  int32_t index_;
  cudaStream_t stream_;
};

// Kernels count rows and features in 32 bits (offsets into memory in 64).
inline int as_int(int64_t extent, const char* what) {
  STD_TORCH_CHECK(extent <= std::numeric_limits<int>::max(), what, ": must be below 2**31 on cuda, got ", extent,
                  "; split the batch");
  return static_cast<int>(extent);
}

inline Output output(const Tensor& tensor) { return {tensor.mutable_data_ptr(), tensor.scalar_type() == ScalarType::Double}; }
inline Output output(const OptionalTensor& tensor) { return tensor ? output(*tensor) : Output{nullptr, false}; }

// Asserts on the device that offsets rise from 0 to M.
void check_offsets(const Device& device, const Samples& samples);

// Sets *flag to 1 where the tensor, of one to three axes, is not finite. Launched before the kernels that read the flag.
void raise_flag(const Device& device, const OptionalTensor& flag, const OptionalTensor& tensor);

template <typename Real>
void add_partials(const Device& device, const Partials<Real>& params);

void add_norms(const Device& device, const NormPartials& params);

}  // namespace fisherfast
