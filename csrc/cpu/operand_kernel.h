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

  const S* row(const Segment& segment) const {
    return rows.sample(samples, segment.n) + segment.t * rows.stride_t + begin * rows.stride_d;
  }

  int64_t packed_size() const { return panels() * panel_size<R>(kWidth); }

  void bring(const Block& block) const {
    for (int s = 0; s < block.count; ++s) pack(block.segments[s]);
  }

  Matrix<R> panel(const Block&, int64_t index) const { return {packed + index * panel_size<R>(kWidth), kWidth}; }

  void pack(const Segment& segment) const {
    const S* in = row(segment);
    R* out = packed + segment.row * kWidth;
    for (int64_t t = 0; t < segment.rows; ++t, in += rows.stride_t, out += kWidth) {
      const R w = row_weight ? row_weight[samples.begin(segment.n) + segment.t + t] : R(1);
      if (rows.stride_d == 1) {
        pack_row(in, std::integral_constant<int64_t, 1>(), w, out);
      } else {
        pack_row(in, rows.stride_d, w, out);
      }
    }
  }

  template <class Stride>
  void pack_row(const S* in, Stride stride, R w, R* out) const {
    for (int64_t panel = 0; panel < panels(); ++panel) {
      const S* from = in + panel * kWidth * stride;
      R* to = out + panel * panel_size<R>(kWidth);
      const int64_t count = std::min(kWidth, size() - panel * kWidth);
      // Loops of a constant length become vector code.
      if (count == kWidth && squared) {
        for (int64_t c = 0; c < kWidth; ++c) to[c] = widen(from[c * stride]) * widen(from[c * stride]) * w;
      } else if (count == kWidth) {
        for (int64_t c = 0; c < kWidth; ++c) to[c] = widen(from[c * stride]) * w;
      } else {
        for (int64_t c = 0; c < count; ++c) to[c] = widen(from[c * stride]) * (squared ? widen(from[c * stride]) * w : w);
        for (int64_t c = count; c < kWidth; ++c) to[c] = 0;
      }
    }
  }
};
