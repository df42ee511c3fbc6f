// SPDX-License-Identifier: Apache-2.0
// The kernels of csrc/cuda/gram.cuh and the functions of csrc/cuda/plan.h, for tests/test_cuda_on_cpu.py.
#include "emulator.h"
#include "cuda/gram.cuh"

namespace fisherfast {

thread_local __attribute__((aligned(16))) uint16_t stages[GramMma<Half>::kSharedBytes / 2];

namespace {

struct Call {
  int64_t N, T, I, stride_n, stride_t, stride_d, multiprocessors;
  double scale;
  int32_t bias, acc_is_double, eager;
};

// Runs the grid of the real launch. Shares fill partial [shares, D, D], if there are several; their number is returned.
template <typename Tile>
int64_t run(const Call& call, void* acc, const void* x, const float* weight, void* partial,
            void (*kernel)(GramParams<typename Tile::In>)) {
  using In = typename Tile::In;
  GramParams<In> p{};
  p.x = {static_cast<const In*>(x), call.stride_n, call.stride_t, call.stride_d, call.I};
  p.T = static_cast<int>(call.T);
  p.D = static_cast<int>(call.I + call.bias);
  p.weight = weight;
  p.scale = call.scale;
  p.acc = {acc, call.acc_is_double != 0};
  p.in_vectors = in_vectors(p.x);
  const GramGrid grid = cut<Tile>(p, call.N, call.multiprocessors);
  if (grid.shares > 1) p.partial = partial;
  gridDim = {static_cast<unsigned>(grid.tiles), static_cast<unsigned>(grid.shares), 1};
  for (blockIdx.y = 0; blockIdx.y < gridDim.y; ++blockIdx.y)
    for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) {
      std::fill(std::begin(stages), std::end(stages), 0x7fff);  // not a number
      emulator::run_block(Tile::kThreads, call.eager != 0, [&] { kernel(p); });
    }
  return grid.shares;
}

}  // namespace
}  // namespace fisherfast

using namespace fisherfast;

extern "C" {

// The number of shares, or -1 if a kernel did what it must not; then `error` says what.
int64_t gram(char dtype, const Call* call, void* acc, const void* x, const float* weight, void* partial, char (*error)[256]) {
  try {
    if (dtype == 'f') return run<GramFma<float>>(*call, acc, x, weight, partial, gram_fma_kernel<float>);
    if (dtype == 'd') return run<GramFma<double>>(*call, acc, x, weight, partial, gram_fma_kernel<double>);
    if (dtype == 'b' && weight) return run<GramFma<BFloat16>>(*call, acc, x, weight, partial, gram_fma_kernel<BFloat16>);
    if (dtype == 'h' && weight) return run<GramFma<Half>>(*call, acc, x, weight, partial, gram_fma_kernel<Half>);
    if (dtype == 'b') return run<GramMma<BFloat16>>(*call, acc, x, nullptr, partial, gram_mma_kernel<BFloat16>);
    return run<GramMma<Half>>(*call, acc, x, nullptr, partial, gram_mma_kernel<Half>);
  } catch (const std::runtime_error& wrong) {
    std::strncpy(*error, wrong.what(), sizeof(*error) - 1);
    return -1;
  }
}

int splits(int64_t tiles, int64_t units, int64_t multiprocessors) { return choose_splits(tiles, units, multiprocessors); }

void upper_tile(int64_t index, int64_t* position) {
  const UpperTile tile(index);
  position[0] = tile.row;
  position[1] = tile.column;
}

void stage(int index, int T, int64_t* rows) {
  const Stage<32> found(index, T);
  rows[0] = found.n;
  rows[1] = found.t;
  rows[2] = found.count;
}

}
