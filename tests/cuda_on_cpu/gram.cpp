// SPDX-License-Identifier: Apache-2.0
// The kernels of csrc/cuda/gram_*.cuh and the functions of csrc/cuda/plan.h, for tests/test_cuda_gram.py.
#include "launch.h"
#include "cuda/gram_fma.cuh"
#include "cuda/gram_mma.cuh"
#include "cuda/gram_wgmma.cuh"
#include "cuda/tensor_map.cuh"

namespace fisherfast {

thread_local __attribute__((aligned(16))) uint16_t stages[GramMma<Half>::kSharedBytes / 2];

namespace {

struct Call {
  int64_t N, T, I, stride_n, stride_t, stride_d, multiprocessors;
  double scale;
  int32_t bias, acc_is_double, raised, timing, width;  // of a warpgroup's tile, or 0 for the other kernels
};

// Runs the grid of the real launch. Shares fill partial [shares, D, pitch(D)], if there are several; their number is returned.
template <typename Tile>
int64_t run_squares(const Call& call, GramParams<typename Tile::In> p, void* partial, void (*kernel)(GramParams<typename Tile::In>)) {
  const int64_t tiles = square_tiles(p.x.width, Tile::kTileO), shares = cut_rows<Tile>(p, tiles, call.N, call.multiprocessors);
  if (shares > 1) p.partial = partial;
  std::fill(std::begin(stages), std::end(stages), 0x7fff);  // not a number
  emulator::run_grid({static_cast<unsigned>(tiles), static_cast<unsigned>(shares), 1}, Tile::kThreads, 1, timing_of(call.timing),
                     [&] { kernel(p); });
  return shares;
}

template <typename Tile>
int64_t run_wgmma(const Call& call, GramParams<typename Tile::In> p, void* partial) {
  require(in_boxes(p.x, call.N, call.T), "the launch must not choose this kernel");
  const TileGrid tiles = tiles_of<Tile>(p.x.width, p.x.width);
  const int64_t shares = cut_rows<Tile>(p, upper_tiles<Tile>(tiles), call.N, call.multiprocessors);
  if (shares > 1) p.partial = partial;
  const GramWgmmaParams<typename Tile::In> params{tensor_map(p.x, call.N, p.T, Tile::kRows),
                                                  tensor_map(p.x, call.N, p.T, Tile::kRows / tiles.cluster()), p, tiles};
  require(Stages<Tile>::bytes() <= static_cast<int>(emulator::kSharedBytes), "more shared memory than a block has");
  emulator::run_grid({static_cast<unsigned>(tiles.blocks()), static_cast<unsigned>(shares), 1}, Tile::kThreads, tiles.cluster(),
                     timing_of(call.timing), [&] {
                       raise(call.raised, cluster_rank() == 1);
                       gram_wgmma_kernel<Tile>(params);
                     });
  return shares;
}

template <typename In>
int64_t run(const Call& call, void* acc, const void* x, const float* weight, void* partial) {
  GramParams<In> p{};
  p.x = {static_cast<const In*>(x), call.stride_n, call.stride_t, call.stride_d, call.I};
  p.T = static_cast<int>(call.T);
  p.D = static_cast<int>(call.I + call.bias);
  p.weight = weight;
  flag = call.raised == kUp;
  p.flag = &flag;
  p.scale = call.scale;
  p.acc = {acc, call.acc_is_double != 0};
  if constexpr (sizeof(In) == 2) {
    p.in_vectors = in_vectors(p.x, call.N, p.T);
    if (call.width == 192) return run_wgmma<WgmmaTile<In, 192>>(call, p, partial);
    if (call.width == 128) return run_wgmma<WgmmaTile<In, 128>>(call, p, partial);
    if (!weight) return run_squares<GramMma<In>>(call, p, partial, gram_mma_kernel<In>);
  }
  return run_squares<GramFma<In>>(call, p, partial, gram_fma_kernel<In>);
}

}  // namespace
}  // namespace fisherfast

using namespace fisherfast;

extern "C" {

// The number of shares.
int64_t gram(char dtype, const Call* call, void* acc, const void* x, const float* weight, void* partial, char (*error)[256]) {
  return or_error(error, [&] {
    return dispatch_letter(dtype, [&](auto type) { return run<typename decltype(type)::type>(*call, acc, x, weight, partial); });
  });
}

int splits(int64_t tiles, int64_t units, int64_t workspace, int64_t multiprocessors) {
  return choose_splits(tiles, units, workspace, multiprocessors);
}

int width(int64_t wide, int64_t narrow, int64_t multiprocessors) { return choose_width(wide, narrow, multiprocessors); }

void upper_tile(int64_t index, int64_t* position) {
  const UpperTile tile(index);
  position[0] = tile.row;
  position[1] = tile.column;
}

int64_t blocks(int rows, int columns) { return TileGrid{rows, columns}.blocks(); }

void tile_of_block(int rows, int columns, int64_t block, int64_t* position) {
  const StripTile tile = TileGrid{rows, columns}.of_block(block);
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
