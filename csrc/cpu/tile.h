// SPDX-License-Identifier: Apache-2.0
// What linear_sq_ and conv_sq_ share: both add the squares of sample gradients that are products of two matrices, rows of g
// by rows of x. The accumulator is cut into tiles; a thread takes a tile, walks the samples, and keeps what it adds in its
// own fp32 copy of the tile. The tiles are planned here, tile_kernel.h does one.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <type_traits>
#include <utility>
#include <vector>

#include "cpu/cpu.h"

namespace fisherfast {

// Sums are short chains of additions (kDepth positions, then kRun samples, then blocks of those), for the sake of their last
// digits: one chain over thousands of fp32 terms would lose some.
constexpr int64_t kDepth = 128;  // most rows multiplied in one go; that many of 48 columns of x stay in L1
constexpr int64_t kRun = 32;     // most samples in one go
constexpr int64_t kMaxTileRows = 256, kMaxTileColumns = 528;    // about half of a 1 MiB L2 in fp32
constexpr int64_t kTallTileRows = 512, kTallTileColumns = 264;  // where columns cost more than rows

// How many bfloat16 numbers add up to one of an input.
template <class S>
constexpr int bfloat16_parts = std::is_same_v<S, BFloat16> ? 1
                               : std::is_same_v<S, Half>   ? 2
                                                           : 3;

// An accumulator and the factor of what is added to it.
struct Output {
  Sink sink;
  double scale;
};

// An accumulator cut into down x across tiles of one size, but for the last ones; as often as there are groups.
struct Tiling {
  int64_t rows, columns, down, across;
  int64_t groups = 1;

  int64_t tiles() const { return groups * down * across; }
};

// Per sample n, with C its gradient: squares += w_n C^2, sums += w_n C, norms[n] += |C|^2.
struct Tiles {
  Samples samples;
  const float* weight;  // [N] or null
  Output squares, sums;
  int64_t longest = 0;      // most rows of a sample
  double* norms = nullptr;  // [tiles, N] or null: every tile has its own row
  Tiling tiling{};
  int64_t flush_every = 32;  // blocks added up in a tile before it goes to the accumulator
};

// One tile's code for the instruction set in use, and the sizes of its register block.
template <class Problem>
struct TileKernel {
  int64_t block_rows, block_columns, lanes;
  int64_t chain;  // most products added up in one chain where all samples go into one sum
  void (*tile)(const Problem&, int64_t index);
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Whether matrix registers pay for sample gradients of rows x columns: they take 32 rows of a sample in one step, and operands
// are split and rearranged first, so that an element of them has to take part in some products.
bool matrix_registers_pay(const Samples& samples, int64_t rows, int64_t columns, int64_t least_products = 56);

// The threads that so many multiply-adds are worth.
int64_t threads_for(int64_t products);

// At least as many blocks as the samples are cut into, but for those that are longer than kDepth.
inline int64_t most_blocks(const Samples& samples) {
  return std::max(ceil_div(samples.N, kRun), 2 * ceil_div(samples.M, kDepth));
}

// After how many of B blocks a tile goes to the accumulator. F times in all leave a squared rounding of about F + B / F^2 times
// that of one addition, the least for F near the cube root of B.
inline int64_t blocks_per_flush(int64_t blocks, int64_t least) {
  return std::max(least, static_cast<int64_t>(std::cbrt(static_cast<double>(blocks) * static_cast<double>(blocks))));
}

// Cuts a rows x columns accumulator of reals of so many bytes.
Tiling plan(const Tiles& tiles, int64_t rows, int64_t columns, int64_t block_rows, int64_t block_columns, int64_t bytes,
            int64_t threads, bool tall);

// Runs all tiles; adds what they found of sqnorm to that of the samples from first_sample on.
template <class Problem>
void run_tiles(Problem problem, const TileKernel<Problem>& kernel, int64_t threads, const Sink& sqnorm, int64_t first_sample) {
  const int64_t tiles = problem.tiling.tiles(), N = problem.samples.N;
  std::vector<double> norms(sqnorm ? tiles * N : 0);
  if (sqnorm) problem.norms = norms.data();
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, std::min(threads, tiles), 1, [&](int64_t, int64_t) {
    for (int64_t tile = next++; tile < tiles; tile = next++) kernel.tile(problem, tile);
  });
  for (int64_t n = 0; sqnorm && n < N; ++n) {
    double norm = 0;
    for (int64_t tile = 0; tile < tiles; ++tile) norm += norms[tile * N + n];
    add_to(sqnorm, first_sample + n, norm);
  }
}

}  // namespace fisherfast
