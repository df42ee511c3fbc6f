// SPDX-License-Identifier: Apache-2.0
// gram_ on NVIDIA GPUs: which kernel runs, over how many blocks. The kernels are in gram_wgmma.cuh and gram_mma.cuh (16-bit
// inputs without weights, on Hopper and elsewhere) and gram_fma.cuh (all others).
#include "cuda/common.cuh"
#include "cuda/gram_fma.cuh"
#include "cuda/gram_mma.cuh"
#include "cuda/gram_wgmma.cuh"
#include "cuda/tensor_map.cuh"

namespace fisherfast {
namespace {

// launch(params) runs a kernel over the shares, which add to a workspace, if there are several; a second kernel adds them up, in
// order.
template <typename In, typename Launch>
void run_shares(const Device& device, const Tensor& acc, GramParams<In> p, int64_t shares, Launch launch) {
  using Real = compute_t<In>;
  if (shares == 1) return launch(p);
  const int64_t pitch = Target<Real>::pitch(p.D), extent = p.D * pitch;
  const auto dtype = std::is_same_v<Real, double> ? ScalarType::Double : ScalarType::Float;
  const Tensor workspace = torch::stable::new_empty(acc, {shares * extent}, dtype);
  auto* const partial = static_cast<Real*>(workspace.mutable_data_ptr());
  p.partial = partial;
  launch(p);
  add_partials<Real>(device, {partial, extent, p.D, p.D, pitch, shares, p.scale.exact, p.acc, p.flag, true});
}

template <typename Tile>
void run_squares(const Device& device, const Tensor& acc, GramParams<typename Tile::In> p, int64_t N,
                 void (*kernel)(GramParams<typename Tile::In>), int shared_bytes) {
  const int64_t tiles = square_tiles(p.x.width, Tile::kTileO), shares = cut_rows<Tile>(p, tiles, N, device.multiprocessors());
  run_shares(device, acc, p, shares,
             [&](const auto& params) { device.launch(kernel, dim3(tiles, shares), Tile::kThreads, params, shared_bytes); });
}

template <typename Tile>
void run_wgmma(const Device& device, const Tensor& acc, GramParams<typename Tile::In> p, int64_t N) {
  const TileGrid tiles = tiles_of<Tile>(p.x.width, p.x.width);
  const int64_t shares = cut_rows<Tile>(p, upper_tiles<Tile>(tiles), N, device.multiprocessors());
  const TensorMap left = tensor_map(p.x, N, p.T, Tile::kRows), right = tensor_map(p.x, N, p.T, Tile::kRows / tiles.cluster());
  run_shares(device, acc, p, shares, [&](const auto& params) {
    device.launch(gram_wgmma_kernel<Tile>, dim3(tiles.blocks(), shares), Tile::kThreads,
                  GramWgmmaParams<typename Tile::In>{left, right, params, tiles}, Stages<Tile>::bytes(), tiles.cluster());
  });
}

template <typename In>
void run(const Device& device, const Tensor& acc, GramParams<In> p, int64_t N) {
  if constexpr (sizeof(In) == 2) {
    p.in_vectors = in_vectors(p.x, N, p.T);
    if (!p.weight && in_boxes(p.x, N, p.T) && device.has_wgmma()) {
      using Wide = WgmmaTile<In, 192>;
      using Narrow = WgmmaTile<In, 128>;
      const int64_t I = p.x.width, wide = upper_tiles<Wide>(tiles_of<Wide>(I, I)),
                    narrow = upper_tiles<Narrow>(tiles_of<Narrow>(I, I));
      if (choose_width(wide, narrow, device.multiprocessors()) == Wide::kTileI) return run_wgmma<Wide>(device, acc, p, N);
      return run_wgmma<Narrow>(device, acc, p, N);
    }
    if (!p.weight) return run_squares<GramMma<In>>(device, acc, p, N, gram_mma_kernel<In>, GramMma<In>::kSharedBytes);
  }
  run_squares<GramFma<In>>(device, acc, p, N, gram_fma_kernel<In>, 0);
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
