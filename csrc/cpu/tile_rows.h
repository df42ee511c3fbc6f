// SPDX-License-Identifier: Apache-2.0
// Compiled once per instruction set by each_isa.h, as a part of tile_kernel.h: the rows that are multiplied in one go, and where
// the results go. kStep rows are the fewest that the multiplying code takes at once: it fills up with zeros.

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

inline int64_t whole_steps(int64_t rows) { return ceil_div(rows, kStep) * kStep; }

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
    int64_t taken = 0;
    for (; n < samples.N && block.count < kRun && whole_steps(samples.rows(n)) <= kDepth - taken; ++n) {
      block.segments[block.count++] = {n, 0, block.rows, samples.rows(n)};
      block.rows += samples.rows(n);
      taken += whole_steps(samples.rows(n));
    }
  }

  // Parts of nearly one size, so that none is too short to be efficient.
  void next_part(Block& block) {
    const int64_t left = samples.rows(n) - t, parts = ceil_div(left, kDepth);
    const int64_t part = parts > 1 ? whole_steps(ceil_div(left, parts)) : left;
    block = {part, 1, t > 0, parts > 1, {{n, t, 0, part}}};
    t += part;
    if (parts == 1) ++n, t = 0;
  }
};
