// SPDX-License-Identifier: Apache-2.0
// Compiled once per instruction set by each_isa.h, as a part of tile_kernel.h: a cell block by multiply-adds of vectors.

constexpr int kCells = kBlockRows * kBlockVectors;
constexpr int64_t kStep = 1, kChain = 32;
constexpr bool kPacksAhead = true;

#include "cpu/tile_rows.h"

// c = the product of a segment's rows: kRows columns of g by kVectors vectors of x. Here and below, every loop over c is
// unrolled, or GCC keeps c in memory.
template <class R, int kRows, int kVectors>
[[gnu::always_inline]] inline void multiply_rows(Matrix<R> g, Matrix<R> x, const Segment& segment, typename Lanes<R>::Vector* c) {
  using Vector = typename Lanes<R>::Vector;
  using Unaligned = typename Lanes<R>::Unaligned;
  constexpr int kCount = kRows * kVectors;
  const R* g_row = g.data + segment.row * g.stride;
  const R* x_row = x.data + segment.row * x.stride;
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
}

// The first kVectors vectors of a cell block's rows, sample by sample.
template <class R, int kVectors>
[[gnu::noinline]] void micro_kernel(Matrix<R> g, Matrix<R> x, const Block& block, const float* weight, Target<R> target) {
  using Vector = typename Lanes<R>::Vector;
  constexpr int kCount = kBlockRows * kVectors;
  const auto cell = [](int k) { return k / kVectors * kBlockVectors + k % kVectors; };
  for (int s = 0; s < block.count; ++s) {
    const Segment& segment = block.segments[s];
    Vector c[kCount];
    multiply_rows<R, kBlockRows, kVectors>(g, x, segment, c);
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

// The same for several whole samples, of which only the squares or only the sums are wanted: these stay in registers from one
// sample to the next, for half of the rows at a time. A processor stores less than it multiplies.
template <class R, int kVectors, bool kSquares>
[[gnu::noinline]] void running_kernel(Matrix<R> g, Matrix<R> x, const Block& block, const float* weight, Target<R> target) {
  using Vector = typename Lanes<R>::Vector;
  constexpr int kRows = kBlockRows / 2, kCount = kRows * kVectors;
  Vector* out = kSquares ? target.squares : target.sums;
  Vector norms[kRun];  // of the first half
  for (int half = 0; half < 2; ++half, g.data += kRows, out += kRows * kBlockVectors) {
    Vector sum[kCount];
#pragma GCC unroll 32
    for (int k = 0; k < kCount; ++k) sum[k] = Vector{};
    for (int s = 0; s < block.count; ++s) {
      const Segment& segment = block.segments[s];
      Vector c[kCount];
      multiply_rows<R, kRows, kVectors>(g, x, segment, c);
      if (target.norms) {
        Vector squares[2]{};
#pragma GCC unroll 32
        for (int k = 0; k < kCount; ++k) squares[k % 2] += c[k] * c[k];
        const Vector norm = squares[0] + squares[1];
        if (half == 0) {
          norms[s] = norm;
        } else {
          target.norms[segment.n] += sum_of_lanes<R>(norms[s] + norm);
        }
      }
      const R w = weight ? weight[segment.n] : R(1);
#pragma GCC unroll 32
      for (int k = 0; k < kCount; ++k) sum[k] += kSquares ? w * c[k] * c[k] : w * c[k];
    }
#pragma GCC unroll 32
    for (int k = 0; k < kCount; ++k) out[k / kVectors * kBlockVectors + k % kVectors] += sum[k];
  }
}

template <class R>
using MicroKernel = void (*)(Matrix<R>, Matrix<R>, const Block&, const float*, Target<R>);

// Those that do no more than so many columns ask for. Half of a block is too little work in flight where registers are few.
template <class R>
struct MicroKernels {
  static constexpr bool kRuns = kBlockRows * kBlockVectors >= 24;
  MicroKernel<R> any, squares, sums;

  template <int kVectors>
  static MicroKernels with() {
    if constexpr (kRuns) {
      return {micro_kernel<R, kVectors>, running_kernel<R, kVectors, true>, running_kernel<R, kVectors, false>};
    } else {
      return {micro_kernel<R, kVectors>, nullptr, nullptr};
    }
  }

  static MicroKernels of(int64_t columns) {
    if (columns > (kBlockVectors - 1) * Lanes<R>::count) return with<kBlockVectors>();
    if (columns > Lanes<R>::count) return with<(kBlockVectors + 1) / 2>();
    return with<1>();
  }
};

// Multiplies panels as they were packed.
template <class R, class G, class X>
struct Multiplier {
  using Vector = typename Lanes<R>::Vector;
  const G& g;
  const X& x;
  Matrix<R> right{};
  int64_t columns = 0;  // of the right panel

  static int64_t size(int64_t) { return 0; }  // of its own copies of so many panels of the left operand and one of the right one

  Multiplier(const G& g, const X& x, R*) : g(g), x(x) {}

  void bring_left(const Block&) const {}

  void bring_right(const Block& block, int64_t index) {
    right = x.panel(block, index);
    columns = x.size() - index * Lanes<R>::columns;
  }

  // A cell block: the given panel of the left operand by the right one at hand, but for the vectors that lie outside as a whole.
  // Where a block holds many samples, they are first added up among themselves.
  void multiply(const Block& block, int64_t index, int64_t outside, const float* weight, const Target<R>& cells) const {
    const int64_t skipped = outside / Lanes<R>::count;
    const auto kernels = MicroKernels<R>::of(std::min(columns, Lanes<R>::columns) - skipped * Lanes<R>::count);
    const Matrix<R> left = g.panel(block, index), right{this->right.data + skipped * Lanes<R>::count, this->right.stride};
    const auto inside = [=](Vector* vectors) { return vectors ? vectors + skipped : nullptr; };
    const Target<R> to{inside(cells.squares), inside(cells.sums), inside(cells.carry), cells.norms};
    if (block.count == 1) return kernels.any(left, right, block, weight, to);
    if (kernels.squares && to.squares && !to.sums) return kernels.squares(left, right, block, weight, to);
    if (kernels.sums && to.sums && !to.squares) return kernels.sums(left, right, block, weight, to);
    Vector squares[kCells], sums[kCells];
    if (to.squares) clear(squares);
    if (to.sums) clear(sums);
    kernels.any(left, right, block, weight, {to.squares ? squares : nullptr, to.sums ? sums : nullptr, to.carry, to.norms});
    for (int64_t k = 0; k < kCells - skipped && to.squares; ++k) to.squares[k] += squares[k];
    for (int64_t k = 0; k < kCells - skipped && to.sums; ++k) to.sums[k] += sums[k];
  }

  // Not by {}: for so many bytes GCC writes rep stos, which is slow to start.
  static void clear(Vector* cells) {
#pragma GCC unroll 32
    for (int k = 0; k < kCells; ++k) cells[k] = Vector{};
  }

  void finish() const {}  // what multiply has left to do before cells may be read
};
