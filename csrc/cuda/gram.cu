// SPDX-License-Identifier: Apache-2.0
// gram_ on NVIDIA GPUs: which of the kernels in gram.cuh runs, over how many blocks.
#include "common.cuh"
#include "gram.cuh"

namespace fisherfast {
namespace {

// Shares add to a workspace; a second kernel adds them up, in order.
template <typename Tile>
void launch(const Device& device, const Tensor& acc, GramParams<typename Tile::In> p, int64_t N,
            void (*kernel)(GramParams<typename Tile::In>), int shared_bytes) {
  using Real = compute_t<typename Tile::In>;
  const auto [tiles, shares] = cut<Tile>(p, N, device.multiprocessors());
  const dim3 grid(tiles, shares);
  if (shares == 1) return device.launch(kernel, grid, Tile::kThreads, p, shared_bytes);
  const int64_t extent = static_cast<int64_t>(p.D) * p.D;
  const auto dtype = std::is_same_v<Real, double> ? ScalarType::Double : ScalarType::Float;
  const Tensor workspace = torch::stable::new_empty(acc, {shares * extent}, dtype);
  auto* const partial = static_cast<Real*>(workspace.mutable_data_ptr());
  p.partial = partial;
  device.launch(kernel, grid, Tile::kThreads, p, shared_bytes);
  add_partials<Real>(device, {partial, extent, extent, static_cast<int>(shares), p.scale, p.acc, p.flag, p.D});
}

template <typename In>
void run(const Device& device, const Tensor& acc, GramParams<In> p, int64_t N) {
  if constexpr (sizeof(In) == 2) {
    p.in_vectors = in_vectors(p.x);
    if (!p.weight) return launch<GramMma<In>>(device, acc, p, N, gram_mma_kernel<In>, GramMma<In>::kSharedBytes);
  }
  launch<GramFma<In>>(device, acc, p, N, gram_fma_kernel<In>, 0);
}

void gram(Tensor acc, Tensor x, double scale, OptionalTensor weight, bool bias, OptionalTensor flag) {
  const Device device(acc);
  Samples samples = samples_of_rows(x);
  for (int64_t extent : {samples.M, acc.size(0)}) as_int(extent, "gram_: the number of rows, and D");
  raise_flag(device, flag, x);
  raise_flag(device, flag, weight);
  if (samples.M == 0 || acc.numel() == 0) return;
  dispatch_input("gram_", x.scalar_type(), [&](auto type) {
    using In = typename decltype(type)::type;
    GramParams<In> p{};
    p.x = rows_of<In>(x);
    join_samples(p.x, samples);
    p.T = static_cast<int>(samples.T);
    p.D = static_cast<int>(acc.size(0));
    p.weight = data_or_null<float>(weight);
    p.flag = data_or_null<int32_t>(flag);
    p.scale = scale;
    p.acc = output(acc);
    run(device, acc, p, samples.N);
  });
}

}  // namespace
}  // namespace fisherfast

STABLE_TORCH_LIBRARY_IMPL(fisherfast_cpp, CUDA, m) { m.impl("gram_", TORCH_BOX(&fisherfast::gram)); }
