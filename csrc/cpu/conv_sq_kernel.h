// SPDX-License-Identifier: Apache-2.0
// Compiled once per instruction set by each_isa.h: the tiles of conv_sq_, which unfold the images as they pack them.
#include "cpu/tile_kernel.h"

#include "cpu/conv_images_kernel.h"

// Some channels of g, which was brought in panels.
template <class R>
struct GradientPanels {
  const ConvProblem<R>& problem;
  const R* g;  // the first panel
  int64_t channels;
  R* packed = nullptr;

  int64_t size() const { return channels; }
  int parts() const { return problem.parts; }
  Matrix<R> source(const Block&, int64_t) const { return {}; }
  int64_t panels() const { return (channels + kBlockRows - 1) / kBlockRows; }
  int64_t packed_size() const { return 0; }

  void bring(const Block&) const {}

  Matrix<R> panel(const Block& block, int64_t index) const {
    const int64_t row = problem.samples.begin(block.segments[0].n) + block.segments[0].t;
    return {g + (index * problem.rows + row) * kBlockRows, kBlockRows};
  }
};

// Columns [begin, end) of the unfolded images of one group. A panel is packed just before it is used, so it is in L1.
template <class R>
struct Patches {
  using Unaligned = typename Lanes<R>::Unaligned;
  static constexpr int64_t kColumns = Lanes<R>::columns;
  const ConvProblem<R>& problem;
  const R* x;
  int64_t begin, end;
  R* packed = nullptr;

  int64_t size() const { return end - begin; }
  int parts() const { return problem.parts; }
  Matrix<R> source(const Block&, int64_t) const { return {}; }
  int64_t panels() const { return (size() + kColumns - 1) / kColumns; }
  int64_t packed_size() const { return panel_size<R>(kColumns); }

  void bring(const Block&) const {}

  Matrix<R> panel(const Block& block, int64_t index) const {
    const int64_t first = problem.first_move[begin / kColumns + index], last = problem.first_move[begin / kColumns + index + 1];
    for (int s = 0; s < block.count; ++s) pack(block.segments[s], problem.moves + first, problem.moves + last);
    const int64_t used = std::min(kColumns, size() - index * kColumns);
    for (int64_t t = 0; t < block.rows && used < kColumns; ++t)
      std::memset(packed + t * kColumns + used, 0, (kColumns - used) * sizeof(R));
    return {packed, kColumns};
  }

  void pack(const Segment& segment, const Move* first, const Move* last) const {
    if (last - first == kBlockVectors) {
      pack_rows(segment, first, std::integral_constant<int64_t, kBlockVectors>());
    } else {
      pack_rows(segment, first, last - first);
    }
  }

  // With a constant number of moves they stay in registers.
  template <class Count>
  void pack_rows(const Segment& segment, const Move* moves, Count count) const {
    const int64_t row = problem.samples.begin(segment.n) + segment.t;
    int64_t p = row % problem.P;
    const R* image = x + row / problem.P * problem.frame;
    R* out = packed + segment.row * kColumns;
    for (int64_t t = 0; t < segment.rows; ++t, out += kColumns) {
      const R* in = image + problem.positions[p];
      for (int64_t move = 0; move < count; ++move)
        *reinterpret_cast<Unaligned*>(out + moves[move].to) = *reinterpret_cast<const Unaligned*>(in + moves[move].from);
      if (++p == problem.P) image += problem.frame, p = 0;
    }
  }
};

#if defined(FISHERFAST_AMX)
// A panel from frames of pairs: nothing is left to do but to copy them to their places in the tiles.
template <int kCount, int kHalves>
[[gnu::noinline]] void copy_pairs(const Patches<float>& x, const Block& block, const Move* moves, uint16_t* out) {
  const ConvProblem<float>& problem = x.problem;
  const int64_t part = problem.part / Lanes<float>::count;
  for (int s = 0; s < block.count; ++s) {
    const Segment& segment = block.segments[s];
    const int64_t row = problem.samples.begin(segment.n) + segment.t;
    int64_t p = row % problem.P;
    const float* image = x.x + row / problem.P * problem.frame;
    for (int64_t t = 0; t < segment.rows; t += kStep, out += kStepSize) {
      auto* tiles = reinterpret_cast<Floats*>(out);
      for (int64_t pair = 0; pair < 16; ++pair, ++tiles) {
        const bool exists = t + 2 * pair < segment.rows;
        const float* in = image + problem.positions[p];
        for (int half = 0; half < kHalves; ++half) {
          const auto* words = reinterpret_cast<const Floats*>(in + moves[half].from);
          for (int i = 0; i < kCount; ++i) tiles[(2 * i + half) * 16] = exists ? words[i * part] : Floats{};
        }
        if (exists && (p += 2) == problem.P) image += problem.frame, p = 0;
      }
    }
  }
}

// Its tiles, if frames hold pairs.
inline bool bring_parts(const Patches<float>& x, const Block& block, int64_t panel, int halves, uint16_t* out) {
  if (!x.problem.pair) return false;
  const Move* moves = x.problem.moves + x.problem.first_move[x.begin / x.kColumns + panel];
  constexpr decltype(&copy_pairs<1, 1>) kCopies[kParts][2] = {
      {copy_pairs<1, 1>, copy_pairs<1, 2>}, {copy_pairs<2, 1>, copy_pairs<2, 2>}, {copy_pairs<3, 1>, copy_pairs<3, 2>}};
  kCopies[x.parts() - 1][halves - 1](x, block, moves, out);
  return true;
}
#endif

// A tile of an accumulator whose columns are in an order of its own: rows of cells are put in its order one by one.
struct OrderedPlace {
  int64_t first, stride;  // of the accumulator's rows
  const Place *begin, *end;

  int64_t outside(int64_t, int64_t) const { return 0; }

  template <class Tile>
  void prefetch(const Tile&, int64_t, int64_t) const {}
  template <class Tile, class Cell>
  void add_cell(const Tile&, int64_t, int64_t, const Cell&) const {}

  template <class Tile>
  void add_tile(const Tile& tile) const {
    if (tile.target.squares) add(tile, tile.target.squares, tile.work.squares);
    if (tile.target.sums) add(tile, tile.target.sums, tile.work.sums);
  }

  template <class Tile, class Vector>
  void add(const Tile& tile, Vector* cells, const Output& output) const {
    if (output.sink.is_double) {
      add_rows(tile, cells, static_cast<double*>(output.sink.data) + first, output.scale);
    } else {
      add_rows(tile, cells, static_cast<float*>(output.sink.data) + first, output.scale);
    }
    std::memset(static_cast<void*>(cells), 0, tile.cells() * sizeof(Vector));
  }

  template <class Tile, class Vector, class A>
  void add_rows(const Tile& tile, const Vector* cells, A* out, double scale) const {
    using R = typename Tile::Real;
    constexpr int64_t kColumns = Tile::kColumns;
    R line[kMaxTileColumns];
    for (int64_t row = 0; row < tile.g.size(); ++row, out += stride) {
      if (row + 2 < tile.g.size()) prefetch(out + 2 * stride);
      const R* cell = reinterpret_cast<const R*>(cells + row / kBlockRows * kCells) + row % kBlockRows * kColumns;
      for (int64_t q = 0; q < tile.x.panels(); ++q, cell += tile.g.panels() * kBlockRows * kColumns)
        for (int64_t c = 0; c < kColumns; ++c) line[q * kColumns + c] = cell[c];
      add_row(line, out, scale);
    }
  }

  // Rows are far apart, so the processor does not see them coming.
  template <class A>
  void prefetch(const A* out) const {
    for (const A *at = out + begin->to, *last = out + end[-1].to; at <= last; at += 64 / sizeof(A)) __builtin_prefetch(at, 1);
  }

  template <class A, class R>
  void add_row(const R* line, A* out, double scale) const {
    using Wide = std::common_type_t<A, R>;
    const Wide factor = static_cast<Wide>(scale);
    for (const Place* place = begin; place < end; ++place)
      out[place->to] = static_cast<A>(out[place->to] + factor * static_cast<Wide>(line[place->from]));
  }
};

template <class R>
void conv_tile(const ConvProblem<R>& problem, int64_t index) {
  const Tiling& tiling = problem.tiling;
  const int64_t across = index % tiling.across, down = index / tiling.across % tiling.down;
  const int64_t group = index / tiling.across / tiling.down, column = across * tiling.columns;
  const int64_t channel = down * tiling.rows, o = group * problem.outputs + channel;
  const int64_t panel = group * ((problem.outputs + kBlockRows - 1) / kBlockRows) + channel / kBlockRows;
  const GradientPanels<R> g{problem, problem.g + panel * problem.rows * kBlockRows,
                            std::min(tiling.rows, problem.outputs - channel)};
  const int64_t end = std::min(column + tiling.columns, problem.columns);
  const Patches<R> x{problem, problem.x + group * problem.group, column, end};
  const OrderedPlace place{o * problem.columns, problem.columns, problem.places + column, problem.places + end};
  Tile<R, GradientPanels<R>, Patches<R>, OrderedPlace>{problem, g, x, place}.run(index);
}

// Channels [first, first + count) of image n, of which there are at most a vector.
template <class S>
void bring_vector(const ConvProblem<compute_t<S>>&, const Images<S>& images, int64_t n, int64_t first, int64_t count,
                  compute_t<S>* out, int64_t pixel_stride) {
  const S* in = images.data + n * images.stride_n + first * images.stride_c;
  const int channels = static_cast<int>(count);
  ChannelBlock<S, Lanes<compute_t<S>>::count>{images, in, out, pixel_stride, channels, channels}.bring();
}

// The same for as many channels as a panel of g has, or fewer: the others are zero.
template <class S>
void bring_panel(const ConvProblem<compute_t<S>>&, const Images<S>& images, int64_t n, int64_t first, int64_t count,
                 compute_t<S>* out, int64_t) {
  constexpr int kWidth = kBlockRows < Lanes<compute_t<S>>::count ? kBlockRows : Lanes<compute_t<S>>::count;
  for (int start = 0; start < kBlockRows; start += kWidth) {
    const S* in = images.data + n * images.stride_n + (first + start) * images.stride_c;
    const int width = std::min(kWidth, kBlockRows - start);
    const int channels = static_cast<int>(std::max<int64_t>(0, std::min<int64_t>(width, count - start)));
    ChannelBlock<S, kWidth>{images, in, out + start, kBlockRows, channels, width}.bring();
  }
}

#if defined(FISHERFAST_AMX)
// A vector of channels as words of the pair of a pixel and the one that the next position looks at, which a row of a tile
// consists of: what nine offsets of a kernel look at is split once.
template <class S>
void bring_pairs(const ConvProblem<float>& problem, const Images<S>& images, int64_t n, int64_t first, int64_t count, float* out,
                 int64_t pixel_stride) {
  if (!problem.pair) return bring_vector<S>(problem, images, n, first, count, out, pixel_stride);
  constexpr int64_t kLanes = Lanes<float>::count;
  const int64_t pixels = problem.part / images.channels, part = problem.part / kLanes;
  auto* alone = static_cast<Floats*>(scratch((pixels + problem.pair) * sizeof(Floats)));
  bring_vector<S>(problem, images, n, first, count, reinterpret_cast<float*>(alone), kLanes);
  std::memset(static_cast<void*>(alone + pixels), 0, problem.pair * sizeof(Floats));
  auto* words = reinterpret_cast<Floats*>(out);
  for (int64_t p = 0; p < pixels; ++p) split_pairs<bfloat16_parts<S>>(alone[p], alone[p + problem.pair], words + p, part);
}
#endif

template <class S>
ConvKernel<S> conv_kernel() {
  using R = compute_t<S>;
#if defined(FISHERFAST_AMX)
  constexpr auto bring_x = bring_pairs<S>;
#else
  constexpr auto bring_x = bring_vector<S>;
#endif
  return {{kBlockRows, Lanes<R>::columns, Lanes<R>::count, kChain, &conv_tile<R>}, bring_x, &bring_panel<S>};
}
