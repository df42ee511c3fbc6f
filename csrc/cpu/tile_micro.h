// SPDX-License-Identifier: Apache-2.0
// Compiled once per instruction set by each_isa.h, as a part of tile_kernel.h: a cell block by multiply-adds of vectors.

constexpr int kCells = kBlockRows * kBlockVectors;
constexpr int64_t kStep = 1, kChain = 32;
constexpr bool kPacksAhead = true;

#include "cpu/tile_rows.h"

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

// Multiplies panels as they were packed.
template <class R, class G, class X>
struct Multiplier {
  using Vector = typename Lanes<R>::Vector;
  const G& g;
  const X& x;
  Matrix<R> right{};
  MicroKernel<R> micro_kernel = nullptr;

  static int64_t size(int64_t) { return 0; }  // of its own copies of so many panels of the left operand and one of the right one

  Multiplier(const G& g, const X& x, R*) : g(g), x(x) {}

  void bring_left(const Block&) const {}

  void bring_right(const Block& block, int64_t index) {
    right = x.panel(block, index);
    micro_kernel = micro_kernel_of<R>(x.size() - index * Lanes<R>::columns);
  }

  // A cell block: the given panel of the left operand by the right one at hand. Where a block holds many samples, they are first
  // added up among themselves.
  void multiply(const Block& block, int64_t index, const float* weight, const Target<R>& to) const {
    constexpr int kDirect = 1;
    const Matrix<R> left = g.panel(block, index);
    if (block.count <= kDirect) return micro_kernel(left, right, block, weight, to);
    Vector squares[kCells]{}, sums[kCells]{};
    micro_kernel(left, right, block, weight, {to.squares ? squares : nullptr, to.sums ? sums : nullptr, to.carry, to.norms});
    for (int k = 0; k < kCells && to.squares; ++k) to.squares[k] += squares[k];
    for (int k = 0; k < kCells && to.sums; ++k) to.sums[k] += sums[k];
  }

  void finish() const {}  // what multiply has left to do before cells may be read
};
