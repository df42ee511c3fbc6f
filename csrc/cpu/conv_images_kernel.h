// SPDX-License-Identifier: Apache-2.0
// Compiled once per instruction set by each_isa.h, after lanes.h: brings a few channels of an image, at most a vector of them.

// kWidth channels of one image, or fewer; pixels of the target lie a stride apart.
template <class S, int kWidth>
struct ChannelBlock {
  using R = compute_t<S>;
  using Vector = typename Lanes<R>::Vector;
  static constexpr int kLanes = Lanes<R>::count;
  const Images<S>& images;
  const S* in;
  R* out;
  int64_t pixel_stride;
  int count, width;  // channels there are; channels to write, the rest of them zeros

  const Pixel& pixel(int64_t index) const { return images.pixels[index]; }

  void bring() const {
    for (int64_t i = 0; i < images.hole_count; ++i) std::memset(out + images.holes[i] * pixel_stride, 0, width * sizeof(R));
    if (count < kWidth) return one_by_one(0, images.pixel_count);
    if (images.stride_c == 1) return copy();
    for (int64_t first = 0; first < images.pixel_count;) {
      const int64_t left = pixel(first).run;
      if (left >= kLanes) {
        transposed(first);
        first += kLanes;
      } else if (first > 0 && left + first >= kLanes && pixel(first + left - kLanes).run == kLanes) {
        transposed(first + left - kLanes);  // the end of a run: some of it again
        first += left;
      } else {
        one_by_one(first, first + 1);
        ++first;
      }
    }
  }

  void copy() const {
    for (int64_t i = 0; i < images.pixel_count; ++i)
      if (pixel(i).to >= 0)
        for (int c = 0; c < kWidth; ++c) out[pixel(i).to * pixel_stride + c] = widen(in[pixel(i).from + c]);
  }

  // As many positions side by side as a vector has lanes.
  void transposed(int64_t first) const {
    Vector rows[kLanes];
    const S* start = in + pixel(first).from;
#pragma GCC unroll 16
    for (int c = 0; c < kLanes; ++c) rows[c] = c < kWidth ? load_wide(start + c * images.stride_c) : Vector{};
    transpose<R>(rows);
    if (pixel(first).line >= kLanes) {
      R* target = out + pixel(first).to * pixel_stride;
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) std::memcpy(target + i * pixel_stride, &rows[i], kWidth * sizeof(R));
      return;
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      const int64_t to = pixel(first + i).to;
      if (to >= 0) std::memcpy(out + to * pixel_stride, &rows[i], kWidth * sizeof(R));
    }
  }

  void one_by_one(int64_t first, int64_t last) const {
    for (int64_t index = first; index < last; ++index) {
      const auto [from, to, run, line] = pixel(index);
      if (to < 0) continue;
      R* target = out + to * pixel_stride;
      for (int c = 0; c < count; ++c) target[c] = widen(in[from + c * images.stride_c]);
      for (int c = count; c < width; ++c) target[c] = 0;
    }
  }
};
