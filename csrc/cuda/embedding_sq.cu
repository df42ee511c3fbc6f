// SPDX-License-Identifier: Apache-2.0
// embedding_sq_ on NVIDIA GPUs: sorts the rows and launches the kernels of embedding_sq.cuh.
#include <algorithm>
#include <utility>

#include "cuda/common.cuh"
#include "cuda/embedding_sq.cuh"

namespace fisherfast {
namespace {

using namespace runs;

// torch's stable sort: (values, where each was before).
std::pair<Tensor, Tensor> stable_sort(const Tensor& keys) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  StableIValue stack[4] = {from(keys), from(std::optional<bool>(true)), from(int64_t{-1}), from(false)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::sort", "stable", stack, TORCH_ABI_VERSION));
  return {to<Tensor>(stack[0]), to<Tensor>(stack[1])};
}

template <typename In>
void launch_runs(const Device& device, RunParams<In> p, const Tensor& acc, const OptionalTensor& sqnorm) {
  const int64_t groups = ceil_div(p.g.width, kTile * kWarps), tiles = groups * kWarps;
  OptionalTensor norms;
  if (sqnorm) {
    norms = torch::stable::new_zeros(acc, {p.samples.M * tiles}, ScalarType::Double);
    p.norms = data_or_null<double>(norms);
  }
  device.launch(runs_kernel<In>, dim3(p.samples.M, groups), kThreads, p);
  if (!sqnorm) return;
  const int64_t per_sample = p.samples.offsets ? tiles : tiles * p.samples.T;
  add_norms(device, {p.norms, p.samples.offsets, per_sample, p.samples.N, output(sqnorm), p.flag});
}

void embedding_sq(Tensor acc, Tensor ids, Tensor g, double scale, OptionalTensor weight, OptionalTensor offsets,
                  OptionalTensor total, OptionalTensor sqnorm, OptionalTensor flag, int64_t padding_idx) {
  const Device device(acc);
  const Samples samples = samples_of(g, offsets);
  const int64_t V = acc.size(0);
  as_int(samples.M, "embedding_sq_: the number of rows");
  check_offsets(device, samples);
  raise_flag(device, flag, g);
  raise_flag(device, flag, weight);
  if (samples.M == 0 || g.size(g.dim() - 1) == 0) return;

  const Tensor unsorted = torch::stable::new_empty(ids, {samples.M});
  const KeyParams keys{samples,     ids.const_data_ptr<int64_t>(),       ids.stride(0), ids.stride(ids.dim() - 1), V,
                       padding_idx, unsorted.mutable_data_ptr<int64_t>()};
  device.launch(keys_kernel, dim3(std::min<int64_t>(ceil_div(samples.M, kThreads), 2048)), kThreads, keys);
  const auto [sorted, order] = stable_sort(unsorted);
  dispatch_input("embedding_sq_", g.scalar_type(), [&, &sorted = sorted, &order = order](auto type) {
    using In = typename decltype(type)::type;
    const int64_t *run_keys = sorted.const_data_ptr<int64_t>(), *run_order = order.const_data_ptr<int64_t>();
    const RunParams<In> runs{
        samples, rows_of<In>(g), run_keys,      run_order, V, data_or_null<float>(weight), data_or_null<int32_t>(flag),
        scale,   output(acc),    output(total), nullptr};
    launch_runs(device, runs, acc, sqnorm);
  });
}

}  // namespace
}  // namespace fisherfast

STABLE_TORCH_LIBRARY_IMPL(fisherfast_cpp, CUDA, m) { m.impl("embedding_sq_", TORCH_BOX(&fisherfast::embedding_sq)); }
