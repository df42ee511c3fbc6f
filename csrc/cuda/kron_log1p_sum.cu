// SPDX-License-Identifier: Apache-2.0
// kron_log1p_sum on NVIDIA GPUs: how the table is cut among blocks of the kernel of kron_log1p_sum.cuh.
#include <utility>

#include "cuda/common.cuh"
#include "cuda/kron_log1p_sum.cuh"

namespace fisherfast {
namespace {

using namespace kron;

void kron_log1p_sum(Tensor acc, Tensor a, Tensor b, double c) {
  if (a.numel() == 0 || b.numel() == 0) return;
  if (a.numel() > b.numel()) std::swap(a, b);
  const Device device(acc);
  const int64_t rows = a.numel(), across = ceil_div(b.numel(), kColumns);
  const int64_t share = ceil_div(rows * across, kBlocks), shares = ceil_div(rows, share), blocks = across * shares;
  const Tensor partial = torch::stable::new_empty(acc, {2 * blocks});
  auto* const sums = partial.mutable_data_ptr<double>();
  dispatch_accumulator("kron_log1p_sum", a.scalar_type(), [&](auto type_a) {
    dispatch_accumulator("kron_log1p_sum", b.scalar_type(), [&](auto type_b) {
      using A = typename decltype(type_a)::type;
      using B = typename decltype(type_b)::type;
      const KronParams<A, B> params{static_cast<const A*>(a.const_data_ptr()),
                                    static_cast<const B*>(b.const_data_ptr()),
                                    rows,
                                    b.numel(),
                                    a.stride(0),
                                    b.stride(0),
                                    share,
                                    c,
                                    sums};
      device.launch(kron_sums_kernel<A, B>, dim3(across, shares), kThreads, params);
    });
  });
  add_norms(device, {sums, nullptr, blocks, 2, output(acc), nullptr});
}

}  // namespace
}  // namespace fisherfast

STABLE_TORCH_LIBRARY_IMPL(fisherfast_cpp, CUDA, m) { m.impl("kron_log1p_sum", TORCH_BOX(&fisherfast::kron_log1p_sum)); }
