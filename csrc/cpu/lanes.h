// SPDX-License-Identifier: Apache-2.0
// Compiled once per instruction set by each_isa.h, as a part of its kernels: vectors of reals.

template <class R>
struct Lanes {
  static constexpr int count = kVectorBytes / sizeof(R);
  static constexpr int64_t columns = kBlockVectors * count;
  typedef R Vector __attribute__((vector_size(kVectorBytes)));
  typedef R Unaligned __attribute__((vector_size(kVectorBytes), aligned(alignof(R)), may_alias));
};

// A vector of inputs, widened.
template <class S>
typename Lanes<compute_t<S>>::Vector load_wide(const S* in) {
  typename Lanes<compute_t<S>>::Vector vector;
  for (int lane = 0; lane < Lanes<compute_t<S>>::count; ++lane) vector[lane] = widen(in[lane]);
  return vector;
}

// After log2(count) rounds of interleaving the first half of the rows with the second, rows have become columns.
template <class R>
void transpose(typename Lanes<R>::Vector* rows) {
  using Vector = typename Lanes<R>::Vector;
  using Index = std::conditional_t<sizeof(R) == 8, int64_t, int32_t>;
  typedef Index Order __attribute__((vector_size(kVectorBytes)));
  constexpr int kCount = Lanes<R>::count;
  Order low{}, high{};
#pragma GCC unroll 16
  for (int lane = 0; lane < kCount; ++lane) {
    low[lane] = lane / 2 + lane % 2 * kCount;
    high[lane] = low[lane] + kCount / 2;
  }
#pragma GCC unroll 4
  for (int round = 1; round < kCount; round *= 2) {
    Vector next[kCount];
#pragma GCC unroll 16
    for (int i = 0; i < kCount / 2; ++i) {
      next[2 * i] = __builtin_shuffle(rows[i], rows[i + kCount / 2], low);
      next[2 * i + 1] = __builtin_shuffle(rows[i], rows[i + kCount / 2], high);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kCount; ++i) rows[i] = next[i];
  }
}
