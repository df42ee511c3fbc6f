// SPDX-License-Identifier: Apache-2.0
// The kernels of csrc/cuda/linear_sq_*.cuh, for tests/test_cuda_linear_sq.py.
#include "launch.h"
#include "cuda/linear_sq_fma.cuh"
#include "cuda/linear_sq_mma.cuh"
#include "cuda/linear_sq_wgmma.cuh"
#include "cuda/tensor_map.cuh"

namespace fisherfast {

thread_local __attribute__((aligned(16))) uint16_t stages[MmaTile<Half, 128>::kSharedBytes / 2];

namespace {

struct Call {
  int64_t N, T, M, O, I, x_strides[3], g_strides[3];
  double scale;
  int32_t samples_per_split, acc_is_double, raised, timing, width;  // of a warpgroup's tile; 0: the kernel of other devices, -1: the pooled one
};
struct Arrays {
  void *acc, *total;
  const void *x, *g;
  const float* weight;
  const int64_t* offsets;
  double* norms;  // [N, partial sums]
  void* partial;  // [splits, outputs, O, pitch of I], zeros if there are offsets, where there are several
};

template <typename In>
LinearSqParams<In> params_of(const Call& call, const Arrays& a) {
  LinearSqParams<In> p{};
  p.samples = {call.N, call.T, call.M, a.offsets};
  p.x = {static_cast<const In*>(a.x), call.x_strides[0], call.x_strides[1], call.x_strides[2], call.I};
  p.g = {static_cast<const In*>(a.g), call.g_strides[0], call.g_strides[1], call.g_strides[2], call.O};
  p.weight = a.weight;
  flag = call.raised == kUp;
  p.flag = &flag;
  p.scale = call.scale;
  p.acc = {a.acc, call.acc_is_double != 0};
  p.total = {a.total, call.acc_is_double != 0};
  p.norms = a.norms;
  p.samples_per_split = call.samples_per_split;
  if (call.samples_per_split < call.N) p.partial = a.partial;
  p.zeroed = a.offsets != nullptr;
  return p;
}

unsigned splits_of(const Call& call) { return static_cast<unsigned>(ceil_div(call.N, call.samples_per_split)); }

// Runs the grid of the real launch; how many partial sums a norm has.
template <typename Traits, typename Params>
int64_t run_tiles(const Call& call, const Params& params, void (*kernel)(Params)) {
  const auto columns = static_cast<unsigned>(ceil_div(call.I, Traits::kTileI)), rows = static_cast<unsigned>(ceil_div(call.O, Traits::kTileO));
  std::fill(std::begin(stages), std::end(stages), 0x7fff);  // not a number
  emulator::run_grid({columns, rows, splits_of(call)}, Traits::kThreads, 1, timing_of(call.timing), [&] { kernel(params); });
  return static_cast<int64_t>(rows) * columns;
}

template <typename In, int kTileI, bool kTotal>
int64_t run_wgmma(const Call& call, const LinearSqParams<In>& p) {
  using Traits = WgmmaTraits<In, kTileI, kTotal>;
  const Samples rows = joined(p.samples);
  require(in_boxes(p.x, rows.N, rows.T) && in_boxes(p.g, rows.N, rows.T), "the launch must not choose this kernel");
  const TileGrid tiles = tiles_of<Traits>(call.O, call.I);
  const LinearSqWgmmaParams<In> params{tensor_map(p.x, rows.N, rows.T, Traits::kRows / tiles.cluster()),
                                       tensor_map(p.g, rows.N, rows.T, Traits::kRows), p, tiles};
  require(Stages<Traits>::bytes() <= static_cast<int>(emulator::kSharedBytes), "more shared memory than a block has");
  emulator::run_grid({static_cast<unsigned>(tiles.blocks()), 1, splits_of(call)}, Traits::kThreads, tiles.cluster(),
                     timing_of(call.timing), [&] {
                       raise(call.raised, cluster_rank() == 1);
                       linear_sq_wgmma_kernel<Traits>(params);
                     });
  return tiles.blocks() * Traits::kWarps;
}

template <typename In, bool kTotal>
int64_t run_samples(const Call& call, const Arrays& a) {
  const LinearSqParams<In> p = params_of<In>(call, a);
  if constexpr (sizeof(In) == 2) {
    if constexpr (!kTotal) {
      if (call.width == 192) return run_wgmma<In, 192, false>(call, p);
    }
    if (call.width == 128) return run_wgmma<In, 128, kTotal>(call, p);
    using Traits = MmaTraits<In, kTotal>;
    const Samples rows = joined(p.samples);
    const LinearSqMmaParams<In> params{p, in_vectors(p.x, rows.N, rows.T), in_vectors(p.g, rows.N, rows.T)};
    return run_tiles<Traits>(call, params, linear_sq_mma_kernel<Traits>);
  } else {
    using Traits = FmaTraits<In, false, kTotal>;
    return run_tiles<Traits>(call, p, linear_sq_fma_kernel<Traits>);
  }
}

// T = 1.
template <typename In>
int64_t run_pooled(Call call, const Arrays& a) {
  using Traits = FmaTraits<In, true, false>;
  LinearSqParams<In> p = params_of<In>(call, a);
  const RankOneNormParams<In> norms{p.x, p.g, {a.norms, true}, p.flag};
  emulator::run_grid({static_cast<unsigned>(call.N), 1, 1}, 32, 1, timing_of(call.timing), [&] { rank_one_norm_kernel<In>(norms); });
  p.norms = nullptr;
  const LinearSqParams<In> squares = pooled(p, true), values = pooled(p, false);
  call.N = squares.samples.N;
  if (a.total) run_tiles<Traits>(call, values, linear_sq_fma_kernel<Traits>);
  run_tiles<Traits>(call, squares, linear_sq_fma_kernel<Traits>);
  return 1;
}

}  // namespace
}  // namespace fisherfast

using namespace fisherfast;

extern "C" {

// How many partial sums a norm has.
int64_t linear_sq(char dtype, const Call* call, const Arrays* a, char (*error)[256]) {
  return or_error(error, [&] {
    return dispatch_letter(dtype, [&](auto type) {
      using In = typename decltype(type)::type;
      if (call->width < 0) return run_pooled<In>(*call, *a);
      return a->total ? run_samples<In, true>(*call, *a) : run_samples<In, false>(*call, *a);
    });
  });
}

}
