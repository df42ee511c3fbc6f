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
  int parts() const { return squared || row_weight ? 3 : bfloat16_parts<S>; }
  int64_t panels() const { return (size() + kWidth - 1) / kWidth; }

  const S* row(const Segment& segment) const {
    return rows.sample(samples, segment.n) + segment.t * rows.stride_t + begin * rows.stride_d;
  }

  // Room for all panels, or for the one at hand where the code that multiplies them keeps copies of its own.
  int64_t packed_size() const { return (kPacksAhead ? panels() : 1) * panel_size<R>(kWidth); }
  R* place(int64_t panel) const { return packed + (kPacksAhead ? panel * panel_size<R>(kWidth) : 0); }

  void bring(const Block& block) const {
    if (kPacksAhead) pack(block, 0, panels());
  }

  Matrix<R> panel(const Block& block, int64_t index) const {
    if (!kPacksAhead) pack(block, index, index + 1);
    return {place(index), kWidth};
  }

  // A panel as it lies in the input, if its rows follow each other there and are widened fast; else null.
  Matrix<S> source(const Block& block, int64_t index) const {
    const bool follows = block.count == 1 || rows.even(samples);
    if (std::is_same_v<S, Half> || squared || row_weight || rows.stride_d != 1 || (index + 1) * kWidth > size() || !follows)
      return {};
    return {row(block.segments[0]) + index * kWidth, rows.stride_t};
  }

  void pack(const Block& block, int64_t first, int64_t last) const {
    for (int s = 0; s < block.count; ++s) pack_segment(block.segments[s], first, last);
  }

  // Panels [first, last) of a segment.
  void pack_segment(const Segment& segment, int64_t first, int64_t last) const {
    const S* in = row(segment);
    const int64_t start = segment.row * kWidth;
    for (int64_t t = 0; t < segment.rows; ++t, in += rows.stride_t) {
      const R w = row_weight ? row_weight[samples.begin(segment.n) + segment.t + t] : R(1);
      if (rows.stride_d == 1) {
        pack_row(in, std::integral_constant<int64_t, 1>(), w, start + t * kWidth, first, last);
      } else {
        pack_row(in, rows.stride_d, w, start + t * kWidth, first, last);
      }
    }
  }

  template <class Stride>
  void pack_row(const S* in, Stride stride, R w, int64_t offset, int64_t first, int64_t last) const {
    for (int64_t panel = first; panel < last; ++panel) {
      const S* from = in + panel * kWidth * stride;
      R* to = place(panel) + offset;
      const int64_t count = std::min(kWidth, size() - panel * kWidth);
      // Loops of a constant length become vector code.
      if (count == kWidth) {
        if (stride == 1) prefetch_line(from + rows.stride_t);
        if (std::is_same_v<S, R> && stride == 1) {
          pack_pieces(from, w, to);
        } else if (squared) {
          for (int64_t c = 0; c < kWidth; ++c) to[c] = widen(from[c * stride]) * widen(from[c * stride]) * w;
        } else {
          for (int64_t c = 0; c < kWidth; ++c) to[c] = widen(from[c * stride]) * w;
        }
      } else {
        for (int64_t c = 0; c < count; ++c) to[c] = widen(from[c * stride]) * (squared ? widen(from[c * stride]) * w : w);
        for (int64_t c = count; c < kWidth; ++c) to[c] = 0;
      }
    }
  }

  static void prefetch_line(const S* from) {
    for (int64_t c = 0; c < kWidth; c += 64 / sizeof(S)) __builtin_prefetch(from + c);
  }

  // In vectors that the width is a multiple of: GCC takes a loop over so few numbers one by one.
  void pack_pieces(const S* from, R w, R* to) const {
    constexpr int64_t kPiece = std::gcd(kWidth, Lanes<R>::count);
    typedef R Piece __attribute__((vector_size(kPiece * sizeof(R)), aligned(alignof(R)), may_alias));
    for (int64_t c = 0; c < kWidth; c += kPiece) {
      const Piece piece = *reinterpret_cast<const Piece*>(from + c);
      *reinterpret_cast<Piece*>(to + c) = squared ? piece * piece * w : piece * w;
    }
  }
};
