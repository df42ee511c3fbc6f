// SPDX-License-Identifier: Apache-2.0
// Compiled once per instruction set by each_isa.h.
#include "cpu/lanes.h"

constexpr int64_t kScoreTile = 256;  // classes: long enough to add up in R, short enough to scan for the label

template <class R>
constexpr int64_t whole_vectors(int64_t C) {
  return (C + Lanes<R>::count - 1) / Lanes<R>::count * Lanes<R>::count;
}

// exp(x) for x <= 0, to about one unit in the last place: 2^n times the Taylor polynomial of the rest, |rest| <= ln(2) / 2.
// Zero where the result would not be a normal number; NaN stays NaN.
template <class R>
typename Lanes<R>::Vector score_exp(typename Lanes<R>::Vector x) {
  using Vector = typename Lanes<R>::Vector;
  using E = ScoreExp<R>;
  typedef typename E::Bits BitVector __attribute__((vector_size(kVectorBytes)));
  const Vector shifted = x * E::kLog2e + E::kMagic;  // its last bits are round(x log2(e))
  const Vector n = shifted - E::kMagic;
  const Vector rest = x - n * E::kLn2High - n * E::kLn2Low;
  Vector p = Vector{} + E::kTaylor[E::kDegree];
#pragma GCC unroll 16
  for (int k = E::kDegree - 1; k >= 0; --k) p = p * rest + E::kTaylor[k];
  const BitVector power = (reinterpret_cast<BitVector>(shifted) << E::kMantissa) + E::kOne;
  return x < E::kLowest ? Vector{} : p * reinterpret_cast<Vector>(power);
}

template <class R>
double score_sum_lanes(typename Lanes<R>::Vector lanes) {
  double sum = 0;
  for (int i = 0; i < Lanes<R>::count; ++i) sum += static_cast<double>(lanes[i]);
  return sum;
}

template <class R>
double score_sum(const R* tile, int64_t size) {
  using Vector = typename Lanes<R>::Vector;
  Vector lanes{};
  for (int64_t c = 0; c < size; c += Lanes<R>::count) lanes += *reinterpret_cast<const Vector*>(tile + c);
  return score_sum_lanes<R>(lanes);
}

// tile[c] = exp(tile[c] - top); returns the sum.
template <class R>
double score_exponentials(R* tile, int64_t size, R top) {
  using Vector = typename Lanes<R>::Vector;
  Vector lanes{};
  for (int64_t c = 0; c < size; c += Lanes<R>::count) {
    auto& at = *reinterpret_cast<Vector*>(tile + c);
    at = score_exp<R>(at - top);
    lanes += at;
  }
  return score_sum_lanes<R>(lanes);
}

// Copies a row into values, filled up with -inf to whole vectors; returns the largest.
template <class S, class R>
R score_load(R* __restrict values, const S* row, int64_t stride, int64_t C) {
  using Vector = typename Lanes<R>::Vector;
  constexpr R kNothing = -std::numeric_limits<R>::infinity();
  Vector lanes = Vector{} + kNothing;
  for (int64_t start = 0; start < C; start += kScoreTile) {
    const int64_t count = std::min(kScoreTile, C - start);
    R* tile = values + start;
    const S* from = row + start * stride;
    if (stride == 1) {
      for (int64_t c = 0; c < count; ++c) tile[c] = widen(from[c]);
    } else {
      for (int64_t c = 0; c < count; ++c) tile[c] = widen(from[c * stride]);
    }
    const int64_t size = whole_vectors<R>(count);
    for (int64_t c = count; c < size; ++c) tile[c] = kNothing;
    for (int64_t c = 0; c < size; c += Lanes<R>::count) {
      const Vector x = *reinterpret_cast<const Vector*>(tile + c);
      lanes = x > lanes ? x : lanes;
    }
  }
  R top = kNothing;
  for (int i = 0; i < Lanes<R>::count; ++i) top = lanes[i] > top ? lanes[i] : top;
  return top;
}

template <class S, class R>
void score_store(S* __restrict out, const R* __restrict values, int64_t C, R factor) {
  for (int64_t c = 0; c < C; ++c) narrow(out[c], values[c] * factor);
}

// The first class of non-zero probability whose running sum exceeds the bound; the last such class where rounding hides it.
template <class R>
int64_t score_draw(const R* values, const double* sums, int64_t tiles, int64_t C, double bound) {
  double carry = 0;
  int64_t tile = 0;
  while (tile < tiles && !(carry + sums[tile] > bound)) carry += sums[tile++];
  int64_t end = std::min((tile + 1) * kScoreTile, C);
  for (int64_t c = tile * kScoreTile; c < end; ++c) {
    carry += static_cast<double>(values[c]);
    if (carry > bound && values[c] > 0) return c;
  }
  while (!(values[end - 1] > 0)) --end;
  return end - 1;
}

// Rows [begin, end) of out and drawn.
template <class S>
void score_rows(const ScoreProblem<S>& problem, int64_t begin, int64_t end) {
  using R = compute_t<S>;
  const int64_t C = problem.logits.width, whole = whole_vectors<R>(C), tiles = (C + kScoreTile - 1) / kScoreTile;
  auto* values = static_cast<R*>(scratch(whole * sizeof(R) + tiles * sizeof(double)));
  auto* sums = reinterpret_cast<double*>(values + whole);
  const auto size = [&](int64_t tile) { return std::min(kScoreTile, whole - tile * kScoreTile); };
  for (int64_t r = begin; r < end; ++r) {
    S* out = problem.out + r * C;
    if (problem.counted && !problem.counted[r]) {
      std::memset(static_cast<void*>(out), 0, C * sizeof(S));
      if (problem.drawn) problem.drawn[r] = -1;
      continue;
    }
    const R top = score_load<S, R>(values, problem.logits.data + r * problem.logits.stride_t, problem.logits.stride_d, C);
    double total = 0;
    for (int64_t t = 0; t < tiles; ++t) total += sums[t] = score_exponentials<R>(values + t * kScoreTile, size(t), top);
    const bool drawable = total > 0;  // not where the row is NaN
    const int64_t y = problem.labels ? problem.labels[r]
                      : drawable     ? score_draw<R>(values, sums, tiles, C, problem.uniform[r] * total)
                                     : 0;
    if (problem.drawn) problem.drawn[r] = y;
    // The entry of y is minus the sum of the others: p_y - 1 would cancel where p_y is close to 1.
    if (drawable) values[y] = 0;
    const int64_t mine = y / kScoreTile;
    sums[mine] = score_sum<R>(values + mine * kScoreTile, size(mine));
    double others = 0;
    for (int64_t t = 0; t < tiles; ++t) others += sums[t];
    score_store<S, R>(out, values, C, static_cast<R>(1 / total));
    narrow(out[y], static_cast<R>(-others / total));
  }
}
