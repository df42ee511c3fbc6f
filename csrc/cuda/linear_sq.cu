// SPDX-License-Identifier: Apache-2.0
// linear_sq_ on NVIDIA GPUs: which kernel runs, over how many blocks. The kernels are in linear_sq_wgmma.cuh and
// linear_sq_mma.cuh (16-bit inputs, on Hopper and elsewhere) and linear_sq_fma.cuh (float32, float64, and T = 1, whose squares
// are never rounded to 16 bits).
#include "cuda/common.cuh"
#include "cuda/linear_sq_fma.cuh"
#include "cuda/linear_sq_mma.cuh"
#include "cuda/linear_sq_wgmma.cuh"
#include "cuda/tensor_map.cuh"

namespace fisherfast {
namespace {

struct Arguments {
  Tensor acc, x, g;
  double scale;
  OptionalTensor weight, total, sqnorm, flag;
  Samples samples;

  int64_t O() const { return g.size(g.dim() - 1); }
  int64_t I() const { return x.size(x.dim() - 1); }
};

template <typename In>
LinearSqParams<In> make_params(const Arguments& a) {
  LinearSqParams<In> p{};
  p.samples = a.samples;
  p.x = rows_of<In>(a.x);
  p.g = rows_of<In>(a.g);
  p.weight = data_or_null<float>(a.weight);
  p.flag = data_or_null<int32_t>(a.flag);
  p.scale = a.scale;
  p.acc = output(a.acc);
  p.total = output(a.total);
  return p;
}

template <typename In, bool kTotal>
void launch_tiles(const Device& device, dim3 grid, const LinearSqParams<In>& p, MmaTraits<In, kTotal>) {
  using Traits = MmaTraits<In, kTotal>;
  const Samples rows = joined(p.samples);
  const LinearSqMmaParams<In> params{p, in_vectors(p.x, rows.N, rows.T), in_vectors(p.g, rows.N, rows.T)};
  device.launch(linear_sq_mma_kernel<Traits>, grid, Traits::kThreads, params, Traits::kSharedBytes);
}

template <typename In, bool kPooled, bool kTotal>
void launch_tiles(const Device& device, dim3 grid, const LinearSqParams<In>& p, FmaTraits<In, kPooled, kTotal>) {
  using Traits = FmaTraits<In, kPooled, kTotal>;
  device.launch(linear_sq_fma_kernel<Traits>, grid, Traits::kThreads, p);
}

// A kernel's blocks for one range of samples, how many partial sums of a norm they store, and their launch over several ranges.
template <typename Traits>
struct Launch {
  dim3 grid;

  explicit Launch(const Arguments& a) : grid(ceil_div(a.I(), Traits::kTileI), ceil_div(a.O(), Traits::kTileO)) {}
  int64_t blocks() const { return static_cast<int64_t>(grid.x) * grid.y; }
  int64_t norms() const { return blocks(); }
  void operator()(const Device& device, const LinearSqParams<typename Traits::In>& p, unsigned splits) const {
    launch_tiles(device, dim3(grid.x, grid.y, splits), p, Traits{});
  }
};

template <typename In, int kTileI, bool kTotal>
struct Launch<WgmmaTraits<In, kTileI, kTotal>> {
  using Traits = WgmmaTraits<In, kTileI, kTotal>;
  TileGrid tiles;
  TensorMap x, g;

  explicit Launch(const Arguments& a) : tiles(tiles_of<Traits>(a.O(), a.I())) {
    const Samples rows = joined(a.samples);
    x = tensor_map(rows_of<In>(a.x), rows.N, rows.T, Traits::kRows / tiles.cluster());
    g = tensor_map(rows_of<In>(a.g), rows.N, rows.T, Traits::kRows);
  }
  int64_t blocks() const { return tiles.blocks(); }
  int64_t norms() const { return blocks() * Traits::kWarps; }
  void operator()(const Device& device, const LinearSqParams<In>& p, unsigned splits) const {
    device.launch(linear_sq_wgmma_kernel<Traits>, dim3(tiles.blocks(), 1, splits), Traits::kThreads,
                  LinearSqWgmmaParams<In>{x, g, p, tiles}, Stages<Traits>::bytes(), tiles.cluster());
  }
};

// Launches over ranges of samples; where there are several, their partial tiles are added by a second kernel, in order.
template <typename Traits>
void launch_splits(const Device& device, const Arguments& a, LinearSqParams<typename Traits::In> p,
                   const Launch<Traits>& launch) {
  using Real = compute_t<typename Traits::In>;
  const int64_t N = p.samples.N, rows = std::max<int64_t>(1, p.samples.M / N);  // of a sample
  const int64_t detour = ceil_div(kWorkspaceRows<typename Traits::In>, rows);
  p.samples_per_split = static_cast<int>(ceil_div(N, choose_splits(launch.blocks(), N, detour, device.multiprocessors())));
  const int splits = static_cast<int>(ceil_div(N, p.samples_per_split));
  if (splits == 1) return launch(device, p, 1);
  const int64_t pitch = Target<Real>::pitch(a.I()), extent = a.O() * pitch, stride = Traits::kTotal ? 2 * extent : extent;
  const auto dtype = std::is_same_v<Real, double> ? ScalarType::Double : ScalarType::Float;
  p.zeroed = p.samples.offsets != nullptr;
  const Tensor workspace = p.zeroed ? torch::stable::new_zeros(a.acc, {splits * stride}, dtype)
                                    : torch::stable::new_empty(a.acc, {splits * stride}, dtype);
  Real* partial = static_cast<Real*>(workspace.mutable_data_ptr());
  p.partial = partial;
  launch(device, p, splits);
  add_partials<Real>(device, {partial, stride, a.O(), a.I(), pitch, splits, p.scale.exact, p.acc, p.flag});
  if (Traits::kTotal) add_partials<Real>(device, {partial + extent, stride, a.O(), a.I(), pitch, splits, 1.0, p.total, p.flag});
}

// One product per sample.
template <typename Traits>
void launch_samples(const Device& device, const Arguments& a) {
  LinearSqParams<typename Traits::In> p = make_params<typename Traits::In>(a);
  const Launch<Traits> launch(a);
  if (!a.sqnorm) return launch_splits(device, a, p, launch);
  const Tensor norms = torch::stable::new_zeros(a.acc, {a.samples.N * launch.norms()}, ScalarType::Double);
  p.norms = static_cast<double*>(norms.mutable_data_ptr());
  launch_splits(device, a, p, launch);
  add_norms(device, {p.norms, nullptr, launch.norms(), a.samples.N, output(a.sqnorm), p.flag});
}

// T = 1: rows are the samples.
template <typename In>
void launch_pooled(const Device& device, const Arguments& a, bool squared) {
  using Traits = FmaTraits<In, true, false>;
  launch_splits(device, a, pooled(make_params<In>(a), squared), Launch<Traits>(a));
}

template <typename In, bool kTotal>
void run_samples(const Device& device, const Arguments& a) {
  if constexpr (sizeof(In) == 2) {
    const Samples rows = joined(a.samples);
    const auto takes = [&](const Tensor& tensor) { return in_boxes(rows_of<In>(tensor), rows.N, rows.T); };
    const bool countable = a.samples.M <= INT32_MAX;  // the copy engine's coordinates are of 32 bits
    if (!device.has_wgmma() || !countable || !takes(a.x) || !takes(a.g)) return launch_samples<MmaTraits<In, kTotal>>(device, a);
    if constexpr (!kTotal) {
      using Wide = WgmmaTraits<In, 192, false>;
      using Narrow = WgmmaTraits<In, 128, false>;
      const int64_t wide = tiles_of<Wide>(a.O(), a.I()).blocks(), narrow = tiles_of<Narrow>(a.O(), a.I()).blocks();
      if (choose_width(wide, narrow, device.multiprocessors()) == Wide::kTileI) return launch_samples<Wide>(device, a);
    }
    launch_samples<WgmmaTraits<In, 128, kTotal>>(device, a);
  } else {
    launch_samples<FmaTraits<In, false, kTotal>>(device, a);
  }
}

template <typename In>
void run(const Device& device, const Arguments& a) {
  if (!a.samples.offsets && a.samples.T == 1) {
    launch_pooled<In>(device, a, true);
    if (a.total) launch_pooled<In>(device, a, false);
    if (a.sqnorm) {
      const RankOneNormParams<In> params{rows_of<In>(a.x), rows_of<In>(a.g), output(a.sqnorm), data_or_null<int32_t>(a.flag)};
      device.launch(rank_one_norm_kernel<In>, dim3(a.samples.N), 32, params);
    }
  } else if (a.total) {
    run_samples<In, true>(device, a);
  } else {
    run_samples<In, false>(device, a);
  }
}

void linear_sq(Tensor acc, Tensor x, Tensor g, double scale, OptionalTensor weight, OptionalTensor offsets, OptionalTensor total,
               OptionalTensor sqnorm, OptionalTensor flag) {
  const Device device(acc);
  const Arguments a{acc, x, g, scale, weight, total, sqnorm, flag, samples_of(g, offsets)};
  for (int64_t extent : {a.samples.N, a.samples.T, a.O(), a.I()}) as_int(extent, "linear_sq_: N, T, O and I");
  check_offsets(device, a.samples);
  raise_flag(device, flag, x);
  raise_flag(device, flag, g);
  raise_flag(device, flag, weight);
  if (a.samples.M == 0 || a.O() == 0 || a.I() == 0) return;
  dispatch_input("linear_sq_", x.scalar_type(), [&](auto type) { run<typename decltype(type)::type>(device, a); });
}

}  // namespace
}  // namespace fisherfast

STABLE_TORCH_LIBRARY_IMPL(fisherfast_cpp, CUDA, m) { m.impl("linear_sq_", TORCH_BOX(&fisherfast::linear_sq)); }
