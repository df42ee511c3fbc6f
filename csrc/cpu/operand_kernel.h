// SPDX-License-Identifier: Apache-2.0
// Compiled once per instruction set by each_isa.h, after tile_kernel.h: an operand whose rows lie in memory, of any strides.

// Columns [begin, end) of an operand, brought to panels of kWidth columns.
template <class S, int64_t kWidth>
struct Operand {
  using R = compute_t<S>;
  const Rows<S>& rows;
  const Samples& samples;
  int64_t begin, end;
  bool squared;
  const float* row_weight;  // or null
  R* packed = nullptr;

  int64_t size() const { return end - begin; }
  int64_t panels() const { return (size() + kWidth - 1) / kWidth; }

  // An odd number of cache lines, so that rows do not compete for the same places in the cache.
  int64_t packed_stride() const {
    constexpr int64_t kLine = 64 / sizeof(R);
    return ((panels() * kWidth + kLine - 1) / kLine | 1) * kLine;
  }

  const S* row(const Segment& segment) const {
    return rows.sample(samples, segment.n) + segment.t * rows.stride_t + begin * rows.stride_d;
  }

  // Long strides hurt only where fewer registers mean that a panel is read more often.
  Panels<R> bring(const Block& block) const {
    Panels<R> panels{{}, {packed, packed_stride()}, 0, kWidth};
    if constexpr (std::is_same_v<S, R> && kVectorBytes >= 64) {
      if (rows.stride_d == 1 && !squared && !row_weight && (block.count == 1 || rows.even(samples))) {
        panels.in_place = {row(block.segments[0]), rows.stride_t};
        panels.whole = (end - begin) / kWidth;
      }
    }
    const int64_t first = panels.whole * kWidth;
    if (begin + first < end) {
      for (int s = 0; s < block.count; ++s) pack(block.segments[s], first);
    }
    return panels;
  }

  void pack(const Segment& segment, int64_t first) const {
    const S* in = row(segment) + first * rows.stride_d;
    R* out = packed + segment.row * packed_stride();
    for (int64_t t = 0; t < segment.rows; ++t, in += rows.stride_t, out += packed_stride()) {
      const R w = row_weight ? row_weight[samples.begin(segment.n) + segment.t + t] : R(1);
      if (rows.stride_d == 1) {
        pack_row(in, std::integral_constant<int64_t, 1>(), w, first, out);
      } else {
        pack_row(in, rows.stride_d, w, first, out);
      }
    }
  }

  template <class Stride>
  void pack_row(const S* in, Stride stride, R w, int64_t first, R* out) const {
    if (squared) {
      for (int64_t c = first; c < end - begin; ++c, in += stride) out[c] = widen(*in) * widen(*in) * w;
    } else {
      for (int64_t c = first; c < end - begin; ++c, in += stride) out[c] = widen(*in) * w;
    }
    for (int64_t c = end - begin; c < panels() * kWidth; ++c) out[c] = 0;
  }
};
