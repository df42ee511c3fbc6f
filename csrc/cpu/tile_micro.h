// SPDX-License-Identifier: Apache-2.0
// Compiled once per instruction set by each_isa.h, as a part of tile_kernel.h: the register block, and the rows it walks.

#include "cpu/lanes.h"

constexpr int kCells = kBlockRows * kBlockVectors;

// Rows of an operand, in place or packed.
template <class R>
struct Matrix {
  const R* data;
  int64_t stride;
};

// Rows t, ..., t + rows - 1 of sample n; the first of them is the given row of the block.
struct Segment {
  int64_t n, t, row, rows;
};

// Rows multiplied in one go: whole samples, or a part of one that is longer than kDepth.
struct Block {
  int64_t rows;
  int count;
  bool resumes, unfinished;
  Segment segments[kRun];
};

// Where the results of a micro-tile go; null where they are not wanted.
template <class R>
struct Target {
  typename Lanes<R>::Vector *squares, *sums, *carry;  // carry: products of an unfinished sample
  double* norms;                                      // [N]
};

template <class R>
double sum_of_lanes(typename Lanes<R>::Vector vector) {
  R sums[Lanes<R>::count];
  std::memcpy(sums, &vector, sizeof sums);
#pragma GCC unroll 8
  for (int half = Lanes<R>::count / 2; half > 0; half /= 2)
#pragma GCC unroll 8
    for (int lane = 0; lane < half; ++lane) sums[lane] += sums[lane + half];
  return sums[0];
}

// The first kVectors vectors of a cell block's rows. Every loop over c is unrolled, or GCC keeps c in memory.
template <class R, int kVectors>
[[gnu::noinline]] void micro_kernel(Matrix<R> g, Matrix<R> x, const Block& block, const float* weight, Target<R> target) {
  using Vector = typename Lanes<R>::Vector;
  using Unaligned = typename Lanes<R>::Unaligned;
  constexpr int kCount = kBlockRows * kVectors;
  const auto cell = [](int k) { return k / kVectors * kBlockVectors + k % kVectors; };
  for (int s = 0; s < block.count; ++s) {
    const Segment& segment = block.segments[s];
    const R* g_row = g.data + segment.row * g.stride;
    const R* x_row = x.data + segment.row * x.stride;
    Vector c[kCount];
#pragma GCC unroll 32
    for (int k = 0; k < kCount; ++k) c[k] = Vector{};
    for (int64_t t = 0; t < segment.rows; ++t, g_row += g.stride, x_row += x.stride) {
      __builtin_prefetch(g_row + kBlockRows);
      Vector b[kVectors];
#pragma GCC unroll 32
      for (int j = 0; j < kVectors; ++j) b[j] = reinterpret_cast<const Unaligned*>(x_row)[j];
#pragma GCC unroll 32
      for (int k = 0; k < kCount; ++k) c[k] += g_row[k / kVectors] * b[k % kVectors];
    }
    if (block.resumes) {
#pragma GCC unroll 32
      for (int k = 0; k < kCount; ++k) c[k] += target.carry[cell(k)];
    }
    if (block.unfinished) {
#pragma GCC unroll 32
      for (int k = 0; k < kCount; ++k) target.carry[cell(k)] = c[k];
      return;
    }
    const R w = weight ? weight[segment.n] : R(1);
    if (target.norms) {
      Vector squares[4]{};  // short chains: each addition waits for the one before it
#pragma GCC unroll 32
      for (int k = 0; k < kCount; ++k) squares[k % 4] += c[k] * c[k];
      target.norms[segment.n] += sum_of_lanes<R>((squares[0] + squares[1]) + (squares[2] + squares[3]));
    }
    if (target.sums) {
#pragma GCC unroll 32
      for (int k = 0; k < kCount; ++k) target.sums[cell(k)] += w * c[k];
    }
    if (target.squares) {
#pragma GCC unroll 32
      for (int k = 0; k < kCount; ++k) target.squares[cell(k)] += w * c[k] * c[k];
    }
  }
}

template <class R>
using MicroKernel = void (*)(Matrix<R>, Matrix<R>, const Block&, const float*, Target<R>);

// The one that does no more than so many columns ask for.
template <class R>
MicroKernel<R> micro_kernel_of(int64_t columns) {
  if (columns > (kBlockVectors - 1) * Lanes<R>::count) return micro_kernel<R, kBlockVectors>;
  if (columns > Lanes<R>::count) return micro_kernel<R, (kBlockVectors + 1) / 2>;
  return micro_kernel<R, 1>;
}

// Cuts the rows into blocks, in order.
struct Cursor {
  const Samples& samples;
  int64_t n = 0, t = 0;

  bool done() {
    while (n < samples.N && samples.rows(n) == 0) ++n;
    return n == samples.N;
  }

  void next(Block& block) {
    if (samples.rows(n) > kDepth) return next_part(block);
    block = {0, 0, false, false, {}};
    for (; n < samples.N && block.count < kRun && samples.rows(n) <= kDepth - block.rows; ++n) {
      block.segments[block.count++] = {n, 0, block.rows, samples.rows(n)};
      block.rows += samples.rows(n);
    }
  }

  // Parts of nearly one size, so that none is too short to be efficient.
  void next_part(Block& block) {
    const int64_t left = samples.rows(n) - t, parts = (left + kDepth - 1) / kDepth, part = (left + parts - 1) / parts;
    block = {part, 1, t > 0, parts > 1, {{n, t, 0, part}}};
    t += part;
    if (parts == 1) ++n, t = 0;
  }
};
