// SPDX-License-Identifier: Apache-2.0
// Compiled once per instruction set by each_isa.h: the sum over pairs of ghost_norm_, of the Gram matrices g [P, P] and x [S, S],
// of which only what is on and above the diagonal is read.
#include "cpu/lanes.h"

// Pixels side by side: rows[channel, pixel] from an image whose pixels lie anywhere, in blocks of a vector of either.
template <class S>
void bring_pixels(const S* image, const std::vector<int64_t>& from, int64_t channels, int64_t stride_c, S* rows) {
  using R = compute_t<S>;
  constexpr int64_t kCount = Lanes<R>::count;
  const auto pixels = static_cast<int64_t>(from.size());
  for (int64_t channel = 0; channel < channels; channel += kCount)
    for (int64_t pixel = 0; pixel < pixels; pixel += kCount) {
      const int64_t high = std::min(kCount, channels - channel), wide = std::min(kCount, pixels - pixel);
      if constexpr (std::is_same_v<S, R>)
        if (stride_c == 1 && high == kCount && wide == kCount) {
          typename Lanes<R>::Vector block[kCount];
          for (int64_t p = 0; p < kCount; ++p)
            block[p] = *reinterpret_cast<const typename Lanes<R>::Unaligned*>(image + from[pixel + p] + channel);
          transpose<R>(block);
          for (int64_t c = 0; c < kCount; ++c)
            *reinterpret_cast<typename Lanes<R>::Unaligned*>(rows + (channel + c) * pixels + pixel) = block[c];
          continue;
        }
      for (int64_t p = pixel; p < pixel + wide; ++p)
        for (int64_t c = channel; c < channel + high; ++c) rows[c * pixels + p] = image[from[p] + c * stride_c];
    }
}

// sum_i g[i] x[i] mask[i], i < count, in vectors: at most a few dozen terms of a lane are added up before fp64.
template <class R>
PairSums masked_products(const R* g, const R* x, const R* mask, int64_t count) {
  using Vector = typename Lanes<R>::Vector;
  using Unaligned = typename Lanes<R>::Unaligned;
  constexpr int64_t kCount = Lanes<R>::count, kChain = 32 * kCount;
  PairSums sums;
  for (int64_t first = 0; first < count; first += kChain) {
    Vector sum{}, size{};
    for (int64_t i = first; i < std::min(first + kChain, count); i += kCount) {
      const Vector a = *reinterpret_cast<const Unaligned*>(g + i), b = *reinterpret_cast<const Unaligned*>(x + i);
      const Vector product = a * b * *reinterpret_cast<const Unaligned*>(mask + i);
      sum += product;
      size += product < 0 ? -product : product;
    }
    for (int64_t lane = 0; lane < kCount; ++lane) sums += {static_cast<double>(sum[lane]), static_cast<double>(size[lane])};
  }
  return sums;
}

// The same for x[i step].
template <class R>
PairSums strided_products(const R* g, const R* x, int64_t step, int64_t count) {
  PairSums sums;
  for (int64_t i = 0; i < count; ++i) {
    const double product = static_cast<double>(g[i]) * static_cast<double>(x[i * step]);
    sums += {product, std::abs(product)};
  }
  return sums;
}

// Of positions p < q.
template <class R>
PairSums pairs_above(const R* g, const R* x, int64_t P, int64_t S, const Meetings<R>& meetings) {
  PairSums sums;
  for (std::size_t line = 0; line < meetings.lines.size(); ++line) {
    const auto [first, count, pixel] = meetings.lines[line];
    for (int64_t i = 0; i < count; ++i) {
      const R *g_row = g + (first + i) * P, *x_row = x + (pixel + i * meetings.step) * S;
      const R *g_next = g_row + first + i + 1, *x_next = x_row + pixel + (i + 1) * meetings.step;
      if (!meetings.mask.empty()) {
        if (meetings.mask[i] != 0) sums += masked_products(g_next, x_next, meetings.mask.data() + i + 1, count - i - 1);
        continue;
      }
      sums += strided_products(g_next, x_next, meetings.step, count - i - 1);
      for (std::size_t later = line + 1; later < meetings.lines.size(); ++later) {
        const PositionLine& other = meetings.lines[later];
        sums += strided_products(g_row + other.first, x_row + other.pixel, meetings.step, other.count);
      }
    }
  }
  return sums;
}

template <class R>
PairSums pair_sums(const R* g, const R* x, int64_t P, int64_t S, const Meetings<R>& meetings) {
  PairSums sums = pairs_above(g, x, P, S, meetings);
  sums += sums;
  for (const PositionLine& line : meetings.lines)
    for (int64_t i = 0; i < line.count; ++i) {
      if (!meetings.mask.empty() && meetings.mask[i] == 0) continue;
      const int64_t p = line.first + i, pixel = line.pixel + i * meetings.step;
      const double product = static_cast<double>(g[p * (P + 1)]) * static_cast<double>(x[pixel * (S + 1)]);
      sums += {product, product};
    }
  return sums;
}
