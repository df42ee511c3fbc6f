// SPDX-License-Identifier: Apache-2.0
// Compiled once per instruction set by each_isa.h: a vector of groups, one kernel row at a time.
#include "cpu/lanes.h"

#include "cpu/conv_images_kernel.h"

constexpr int kMaxTaps = 8;

// out[j] += sum over the stretches of g x, x shifted by j taps. Several positions at once, so that no addition waits for the
// one before; where neighbouring taps of neighbouring positions are the same pixels, the compiler loads them once.
template <class R, int kTaps, bool kDense>
void add_taps(const R* x, const R* g, const Stretch* stretches, int64_t count, int64_t step, int64_t tap_step,
              typename Lanes<R>::Vector* out) {
  using Vector = typename Lanes<R>::Vector;
  constexpr int kLanes = Lanes<R>::count, kRegisters = kVectorBytes >= 64 ? 12 : 8;
  constexpr int kUnroll = kTaps >= kRegisters ? 1 : (kRegisters + kTaps - 1) / kTaps;
  const int64_t by = kDense ? kLanes : step * kLanes, tap = kDense ? kLanes : tap_step * kLanes;
  Vector c[kUnroll * kTaps];
#pragma GCC unroll 32
  for (int k = 0; k < kUnroll * kTaps; ++k) c[k] = Vector{};
  for (const Stretch* stretch = stretches; stretch < stretches + count; ++stretch) {
    const R *at_x = x + stretch->pixel * kLanes, *at_g = g + stretch->position * kLanes;
    int64_t left = stretch->count;
    for (; left >= kUnroll; left -= kUnroll, at_x += kUnroll * by, at_g += kUnroll * kLanes) {
#pragma GCC unroll 32
      for (int k = 0; k < kUnroll * kTaps; ++k)
        c[k] += *reinterpret_cast<const Vector*>(at_g + k / kTaps * kLanes) *
                *reinterpret_cast<const Vector*>(at_x + k / kTaps * by + k % kTaps * tap);
    }
    for (; left > 0; --left, at_x += by, at_g += kLanes) {
#pragma GCC unroll 32
      for (int k = 0; k < kTaps; ++k)
        c[k] += *reinterpret_cast<const Vector*>(at_g) * *reinterpret_cast<const Vector*>(at_x + k * tap);
    }
  }
#pragma GCC unroll 32
  for (int k = kTaps; k < kUnroll * kTaps; ++k) c[k % kTaps] += c[k];
#pragma GCC unroll 32
  for (int k = 0; k < kTaps; ++k) out[k] += c[k];
}

template <class R>
using AddTaps = void (*)(const R*, const R*, const Stretch*, int64_t, int64_t, int64_t, typename Lanes<R>::Vector*);

template <class R, bool kDense>
AddTaps<R> adder_of(int64_t taps) {
  constexpr AddTaps<R> kAdders[kMaxTaps] = {add_taps<R, 1, kDense>, add_taps<R, 2, kDense>, add_taps<R, 3, kDense>,
                                            add_taps<R, 4, kDense>, add_taps<R, 5, kDense>, add_taps<R, 6, kDense>,
                                            add_taps<R, 7, kDense>, add_taps<R, 8, kDense>};
  return kAdders[taps - 1];
}

// One block of groups: as many as a vector has lanes, the last block may have fewer.
template <class S>
struct GroupBlock {
  using R = compute_t<S>;
  using Vector = typename Lanes<R>::Vector;
  static constexpr int kLanes = Lanes<R>::count;
  const DirectProblem<S>& problem;
  int64_t block;
  R *x, *g;          // [channels, frame, lanes], [outputs, P, lanes] of one image
  Vector* gradient;  // [outputs, channels, K] of one sample

  void bring(int64_t image) const {
    const int count = static_cast<int>(std::min<int64_t>(kLanes, problem.groups - block * kLanes));
    const auto bring = [&](const Images<S>& images, int64_t channel, R* out) {
      const S* in = images.data + image * images.stride_n + block * kLanes * images.stride_c + channel;
      ChannelBlock<S, kLanes>{images, in, out, kLanes, count, kLanes}.bring();
    };
    for (int64_t c = 0; c < problem.channels; ++c) bring(problem.x, c * problem.channel_step_x, x + c * problem.frame * kLanes);
    for (int64_t o = 0; o < problem.outputs; ++o) bring(problem.g, o * problem.channel_step_g, g + o * problem.P * kLanes);
  }

  // Adds an image at hand to the gradient, a few stretches at a time: they stay in L1 for all kernel rows and channels.
  void add_image() const {
    for (int64_t first = 0, last = 0; first < problem.stretch_count; first = last) {
      int64_t positions = 0;
      for (; last < problem.stretch_count && positions + problem.stretches[last].count <= kStretch; ++last)
        positions += problem.stretches[last].count;
      Vector* out = gradient;
      for (int64_t o = 0; o < problem.outputs; ++o)
        for (int64_t c = 0; c < problem.channels; ++c)
          for (int64_t row = 0; row < problem.kernel[0] * problem.kernel[1]; ++row, out += problem.kernel[2])
            add_row(x + (c * problem.frame + problem.kernel_rows[row]) * kLanes, g + o * problem.P * kLanes, first, last, out);
    }
  }

  // A kernel row in parts of nearly one size.
  void add_row(const R* row, const R* g_rows, int64_t first, int64_t last, Vector* out) const {
    const int64_t width = problem.kernel[2], parts = (width + kMaxTaps - 1) / kMaxTaps;
    const bool dense = problem.stride == 1 && problem.dilation == 1;
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t begin = part * width / parts, taps = (part + 1) * width / parts - begin;
      const AddTaps<R> add = dense ? adder_of<R, true>(taps) : adder_of<R, false>(taps);
      add(row + begin * problem.dilation * kLanes, g_rows, problem.stretches + first, last - first, problem.stride,
          problem.dilation, out + begin);
    }
  }

  void add_sample(int64_t n, double* squares, double* sums) const {
    const double w = problem.weight ? problem.weight[n] : 1.0;
    const R* values = reinterpret_cast<const R*>(gradient);
    const int64_t count = problem.gradient() * kLanes;
    for (int64_t i = 0; i < count; ++i) squares[i] += w * values[i] * values[i];
    for (int64_t i = 0; i < count && sums; ++i) sums[i] += w * values[i];
    if (!problem.norms) return;
    double norm = 0;
    for (int64_t i = 0; i < count; ++i) norm += static_cast<double>(values[i]) * values[i];
    problem.norms[block * problem.samples + n] += norm;
  }
};

template <class S>
void direct_part(const DirectProblem<S>& problem, int64_t block, int64_t first, int64_t last, double* squares, double* sums) {
  using R = compute_t<S>;
  constexpr int64_t kLanes = Lanes<R>::count;
  const int64_t x_size = problem.channels * problem.frame, g_size = problem.outputs * problem.P, gradient = problem.gradient();
  auto* memory = static_cast<R*>(scratch((x_size + g_size + gradient) * kVectorBytes));
  R *g = memory + x_size * kLanes, *end = g + g_size * kLanes;
  const GroupBlock<S> groups{problem, block, memory, g, reinterpret_cast<typename Lanes<R>::Vector*>(end)};
  for (int64_t n = first; n < last; ++n) {
    std::memset(static_cast<void*>(end), 0, gradient * kVectorBytes);
    const int64_t image_end = problem.offsets ? problem.offsets[n + 1] : n + 1;
    for (int64_t image = problem.offsets ? problem.offsets[n] : n; image < image_end; ++image) {
      groups.bring(image);
      groups.add_image();
    }
    groups.add_sample(n, squares, sums);
  }
}

template <class S>
DirectKernel<S> direct_kernel() {
  using R = compute_t<S>;
  return {Lanes<R>::count, kBlockRows, Lanes<R>::columns, &direct_part<S>};
}
