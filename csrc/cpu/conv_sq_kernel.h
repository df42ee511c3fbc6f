// SPDX-License-Identifier: Apache-2.0
// Compiled once per instruction set by each_isa.h: the tiles of conv_sq_, which unfold the images as they pack them.
#include "cpu/tile_kernel.h"

#include "cpu/conv_images_kernel.h"
#include "cpu/operand_kernel.h"

// Columns [begin, end) of the unfolded images of one group.
template <class R>
struct Patches {
  using Unaligned = typename Lanes<R>::Unaligned;
  const ConvProblem<R>& problem;
  const R* x;
  int64_t begin, end;
  const Move *first, *last;
  R* packed = nullptr;

  int64_t size() const { return end - begin; }
  int64_t panels() const { return (size() + Lanes<R>::columns - 1) / Lanes<R>::columns; }

  // An odd number of cache lines, so that rows do not compete for the same places in the cache.
  int64_t packed_stride() const {
    constexpr int64_t kLine = 64 / sizeof(R);
    return ((panels() * Lanes<R>::columns + kLine - 1) / kLine | 1) * kLine;
  }

  Panels<R> bring(const Block& block) const {
    for (int s = 0; s < block.count; ++s) pack(block.segments[s]);
    return {{}, {packed, packed_stride()}, 0, Lanes<R>::columns};
  }

  void pack(const Segment& segment) const {
    const int64_t row = problem.samples.begin(segment.n) + segment.t;
    int64_t image = row / problem.P, p = row % problem.P;
    R* out = packed + segment.row * packed_stride();
    for (int64_t t = 0; t < segment.rows; ++t, out += packed_stride()) {
      const R* in = x + image * problem.frame + problem.positions[p];
      for (const Move* move = first; move < last; ++move)
        *reinterpret_cast<Unaligned*>(out + move->to) = *reinterpret_cast<const Unaligned*>(in + move->from);
      std::memset(out + size(), 0, (panels() * Lanes<R>::columns - size()) * sizeof(R));
      if (++p == problem.P) ++image, p = 0;
    }
  }
};

// The part of an accumulator that a cell block belongs to; its columns lie at places of their own.
template <class A>
struct ScatteredWindow {
  A* out;
  int64_t stride, rows, columns;
  const int64_t* places;

  void prefetch() const {}

  // Adds a block of cells, and clears it.
  template <class R>
  void add(R* cells, double scale) const {
    using Wide = std::common_type_t<A, R>;
    const Wide factor = static_cast<Wide>(scale);
    for (int64_t row = 0; row < rows; ++row, cells += Lanes<R>::columns) {
      A* line = out + row * stride;
      for (int64_t c = 0; c < columns; ++c) line[places[c]] = static_cast<A>(line[places[c]] + factor * static_cast<Wide>(cells[c]));
      std::memset(cells, 0, Lanes<R>::columns * sizeof(R));
    }
  }
};

struct ScatteredPlace {
  int64_t first, stride;
  const int64_t* places;

  template <class A>
  ScatteredWindow<A> window(A* out, int64_t row, int64_t column, int64_t rows, int64_t columns) const {
    return {out + first + row * stride, stride, rows, columns, places + column};
  }
};

template <class R>
void conv_tile(const ConvProblem<R>& problem, int64_t index) {
  using G = Operand<R, kBlockRows>;
  const Tiling& tiling = problem.tiling;
  const int64_t across = index % tiling.across, down = index / tiling.across % tiling.down;
  const int64_t group = index / tiling.across / tiling.down;
  const int64_t o = group * problem.outputs + down * tiling.rows, column = across * tiling.columns;
  const int64_t o_end = std::min(o + tiling.rows, (group + 1) * problem.outputs);
  const G g{problem.g, problem.samples, o, o_end, false, nullptr};
  const Patches<R> x{problem, problem.x + group * problem.channels, column, std::min(column + tiling.columns, problem.columns),
                     problem.moves + problem.first_move[across], problem.moves + problem.first_move[across + 1]};
  Tile<R, G, Patches<R>, ScatteredPlace>{problem, g, x, {o * problem.columns, problem.columns, problem.places + column}}.run(index);
}

template <class R>
TileKernel<ConvProblem<R>> conv_kernel() {
  return {kBlockRows, Lanes<R>::columns, Lanes<R>::count, &conv_tile<R>};
}

// Channels [block * lanes, ...) of image n, to where the first of them belongs.
template <class S>
void bring_channels(const Images<S>& images, int64_t n, int64_t block, compute_t<S>* out, int64_t pixel_stride) {
  constexpr int64_t kLanes = Lanes<compute_t<S>>::count;
  const int count = static_cast<int>(std::min(kLanes, images.channels - block * kLanes));
  const S* in = images.data + n * images.stride_n + block * kLanes * images.stride_c;
  ChannelBlock<S>{images, in, out, pixel_stride, count, count}.bring();
}
