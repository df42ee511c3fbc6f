// SPDX-License-Identifier: Apache-2.0
// Compiled once per instruction set by each_isa.h: one tile of acc, from packing to the final addition.
//
// A tile is kept in fp32 (fp64 for double inputs) as cells: blocks of kBlockRows x kBlockVectors vectors. Edges need no code
// of their own: operands are padded with zeros when they are packed, and what lies outside is not written back.

// Sums are short chains of fp32 additions (over kDepth positions, kRun samples, kFlush blocks), chained in turn: a single
// chain over thousands of terms would lose digits.
constexpr int64_t kDepth = 128;  // most rows multiplied at once; an x panel of that many stays in L1
constexpr int64_t kRun = 32;     // most samples in a block of rows, and most rows of a product summed in registers
constexpr int64_t kFlush = 32;   // blocks added up in the tile before it goes to acc
constexpr int kDirect = 4;       // most samples of a block that are added straight to the tile
constexpr int kCells = kBlockRows * kBlockVectors;

template <class R>
struct Lanes {
  static constexpr int count = kVectorBytes / sizeof(R);
  static constexpr int64_t columns = kBlockVectors * count;
  typedef R Vector __attribute__((vector_size(kVectorBytes)));
  typedef R Unaligned __attribute__((vector_size(kVectorBytes), aligned(alignof(R)), may_alias));
};

// Rows of an operand, in place or packed.
template <class R>
struct Matrix {
  const R* data;
  int64_t stride;
};

// Rows t, ..., t + rows - 1 of sample n; the first of them is the given row of the block.
struct Segment {
  int64_t n, t, row, rows;
};

// Rows multiplied in one go: whole samples, or a part of one that is longer than kDepth.
struct Block {
  int64_t rows;
  int count;
  bool resumes, unfinished;
  Segment segments[kRun];
};

// Where the results of a micro-tile go; null where they are not wanted.
template <class R>
struct Target {
  typename Lanes<R>::Vector *squares, *sums, *carry;  // carry: products of an unfinished sample
  double* norms;                                      // [N]
};

// Every loop over c is unrolled, or GCC keeps c in memory.
template <class R>
[[gnu::noinline]] void micro_kernel(Matrix<R> g, Matrix<R> x, const Block& block, const float* weight, Target<R> target) {
  using Vector = typename Lanes<R>::Vector;
  using Unaligned = typename Lanes<R>::Unaligned;
  for (int s = 0; s < block.count; ++s) {
    const Segment& segment = block.segments[s];
    const R* g_row = g.data + segment.row * g.stride;
    const R* x_row = x.data + segment.row * x.stride;
    Vector c[kCells];
#pragma GCC unroll 32
    for (int k = 0; k < kCells; ++k) c[k] = Vector{};
    for (int64_t t = 0; t < segment.rows; ++t, g_row += g.stride, x_row += x.stride) {
      __builtin_prefetch(g_row + kBlockRows);
      Vector b[kBlockVectors];
#pragma GCC unroll 32
      for (int j = 0; j < kBlockVectors; ++j) b[j] = reinterpret_cast<const Unaligned*>(x_row)[j];
#pragma GCC unroll 32
      for (int k = 0; k < kCells; ++k) c[k] += g_row[k / kBlockVectors] * b[k % kBlockVectors];
    }
    if (block.resumes) {
#pragma GCC unroll 32
      for (int k = 0; k < kCells; ++k) c[k] += target.carry[k];
    }
    if (block.unfinished) {
#pragma GCC unroll 32
      for (int k = 0; k < kCells; ++k) target.carry[k] = c[k];
      return;
    }
    const R w = weight ? weight[segment.n] : R(1);
    if (target.norms) {
      Vector squares{};
#pragma GCC unroll 32
      for (int k = 0; k < kCells; ++k) squares += c[k] * c[k];
      for (int lane = 0; lane < Lanes<R>::count; ++lane) target.norms[segment.n] += squares[lane];
    }
    if (target.sums) {
#pragma GCC unroll 32
      for (int k = 0; k < kCells; ++k) target.sums[k] += w * c[k];
    }
    if (target.squares) {
#pragma GCC unroll 32
      for (int k = 0; k < kCells; ++k) target.squares[k] += w * c[k] * c[k];
    }
  }
}

// Cuts the rows into blocks, in order.
struct Cursor {
  int64_t n = 0, t = 0;

  bool next_samples(const Samples& samples, Block& block) {
    block = {0, 0, false, false, {}};
    for (; n < samples.N && block.count < kRun; ++n) {
      const int64_t rows = samples.rows(n);
      if (rows > kDepth && block.count == 0) return next_part(rows, block);
      if (rows > kDepth - block.rows) break;
      if (rows > 0) block.segments[block.count++] = {n, 0, block.rows, rows};
      block.rows += rows;
    }
    return block.count > 0;
  }

  // Parts of nearly one size, so that none is too short to be efficient.
  bool next_part(int64_t rows, Block& block) {
    const int64_t parts = (rows - t + kDepth - 1) / kDepth;
    const int64_t part = (rows - t + parts - 1) / parts;
    block = {part, 1, t > 0, parts > 1, {{n, t, 0, part}}};
    t += part;
    if (parts == 1) ++n, t = 0;
    return true;
  }

  bool next_rows(int64_t rows, Block& block) {
    block = {0, 0, false, false, {}};
    while (t < rows && block.rows < kDepth) {
      const int64_t run = std::min({rows - t, kDepth - block.rows, kRun});
      block.segments[block.count++] = {n, t, block.rows, run};
      block.rows += run;
      t += run;
    }
    return block.count > 0;
  }
};

// Columns [begin, end) of an operand, brought to whole panels of kWidth columns.
template <class S, int64_t kWidth>
struct Operand {
  using R = compute_t<S>;
  const Rows<S>& rows;
  const Samples& samples;
  int64_t begin, end;
  bool squared;
  const float* weight;  // per row, or null
  R* packed;

  int64_t panels() const { return (end - begin + kWidth - 1) / kWidth; }

  // An odd number of cache lines, so that rows do not compete for the same places in the cache.
  int64_t packed_stride() const {
    constexpr int64_t kLine = 64 / sizeof(R);
    return ((panels() * kWidth + kLine - 1) / kLine | 1) * kLine;
  }

  Matrix<R> matrix(const Block& block) const {
    if constexpr (std::is_same_v<S, R>) {
      const bool whole = (end - begin) % kWidth == 0 && rows.stride_d == 1 && !squared && !weight;
      const Segment& first = block.segments[0];
      if (whole && (block.count == 1 || rows.even(samples)))
        return {rows.sample(samples, first.n) + first.t * rows.stride_t + begin, rows.stride_t};
    }
    for (int s = 0; s < block.count; ++s) pack(block.segments[s]);
    return {packed, packed_stride()};
  }

  void pack(const Segment& segment) const {
    const int64_t stride = packed_stride();
    const S* row = rows.sample(samples, segment.n) + segment.t * rows.stride_t + begin * rows.stride_d;
    R* out = packed + segment.row * stride;
    for (int64_t t = segment.t; t < segment.t + segment.rows; ++t, row += rows.stride_t, out += stride) {
      const R w = weight ? weight[t] : R(1);
      if (rows.stride_d == 1) {
        pack_row(row, std::integral_constant<int64_t, 1>(), w, out);
      } else {
        pack_row(row, rows.stride_d, w, out);
      }
    }
  }

  template <class Stride>
  void pack_row(const S* row, Stride stride, R w, R* out) const {
    const int64_t width = end - begin;
    if (squared) {
      for (int64_t c = 0; c < width; ++c) out[c] = widen(row[c * stride]) * widen(row[c * stride]) * w;
    } else {
      for (int64_t c = 0; c < width; ++c) out[c] = widen(row[c * stride]) * w;
    }
    for (int64_t c = width; c < panels() * kWidth; ++c) out[c] = 0;
  }
};

// Adds the cells of a tile to an accumulator, and clears them.
template <class A, class R>
void flush(R* cells, A* out, int64_t stride, int64_t rows, int64_t columns, double scale) {
  using Wide = std::common_type_t<A, R>;
  constexpr int64_t kColumns = Lanes<R>::columns;
  const Wide factor = static_cast<Wide>(scale);
  for (int64_t column = 0; column < columns; column += kColumns)
    for (int64_t row = 0; row < (rows + kBlockRows - 1) / kBlockRows * kBlockRows; ++row, cells += kColumns) {
      const int64_t width = row < rows ? std::min(kColumns, columns - column) : 0;
      A* line = out + row * stride + column;
      for (int64_t c = 0; c < width; ++c) line[c] = static_cast<A>(line[c] + factor * static_cast<Wide>(cells[c]));
      std::memset(cells, 0, kColumns * sizeof(R));
    }
}

template <class S>
struct Tile {
  using R = compute_t<S>;
  using Vector = typename Lanes<R>::Vector;
  const LinearProblem<S>& problem;
  int64_t index;
  int64_t o = index / problem.tiling.across * problem.tiling.rows;
  int64_t i = index % problem.tiling.across * problem.tiling.columns;
  Operand<S, kBlockRows> g{problem.g, problem.samples, o, std::min(o + problem.tiling.rows, problem.g.width),
                           problem.squared, problem.product ? problem.weight : nullptr, nullptr};
  Operand<S, Lanes<R>::columns> x{problem.x, problem.samples, i, std::min(i + problem.tiling.columns, problem.x.width),
                                  problem.squared, nullptr, nullptr};
  Target<R> target{};

  int64_t cells() const { return g.panels() * x.panels() * kCells; }

  void allocate() {
    const int64_t sizes[] = {problem.squares.sink ? cells() : 0, problem.sums.sink ? cells() : 0,
                             problem.longest > kDepth ? cells() : 0};
    const int64_t g_size = g.packed_stride() * kDepth, x_size = x.packed_stride() * kDepth;
    const int64_t vectors = sizes[0] + sizes[1] + sizes[2];
    auto* memory = static_cast<Vector*>(scratch(vectors * sizeof(Vector) + (g_size + x_size) * sizeof(R)));
    std::memset(static_cast<void*>(memory), 0, vectors * sizeof(Vector));
    if (sizes[0]) target.squares = memory;
    if (sizes[1]) target.sums = memory + sizes[0];
    if (sizes[2]) target.carry = memory + sizes[0] + sizes[1];
    x.packed = reinterpret_cast<R*>(memory + vectors);
    g.packed = x.packed + x_size;
    if (problem.norms) target.norms = problem.norms + index * problem.samples.N;
  }

  void multiply(const Block& block) const {
    const Matrix<R> g_rows = g.matrix(block), x_rows = x.matrix(block);
    const float* weight = problem.product ? nullptr : problem.weight;
    int64_t cell = 0;
    for (int64_t q = 0; q < x.panels(); ++q) {
      const Matrix<R> x_panel{x_rows.data + q * Lanes<R>::columns, x_rows.stride};
      for (int64_t p = 0; p < g.panels(); ++p, cell += kCells) {
        const Matrix<R> g_panel{g_rows.data + p * kBlockRows, g_rows.stride};
        const Target<R> here{at(target.squares, cell), at(target.sums, cell), at(target.carry, cell), target.norms};
        if (block.count <= kDirect) {
          micro_kernel<R>(g_panel, x_panel, block, weight, here);
          continue;
        }
        Vector squares[kCells]{}, sums[kCells]{};
        micro_kernel<R>(g_panel, x_panel, block, weight,
                        {here.squares ? squares : nullptr, here.sums ? sums : nullptr, here.carry, here.norms});
        for (int k = 0; k < kCells && here.squares; ++k) here.squares[k] += squares[k];
        for (int k = 0; k < kCells && here.sums; ++k) here.sums[k] += sums[k];
      }
    }
  }

  static Vector* at(Vector* cells, int64_t cell) { return cells ? cells + cell : nullptr; }

  void flush_to(Vector* cells, const LinearOutput& output) const {
    if (!cells) return;
    const int64_t I = problem.x.width, offset = o * I + i;
    const int64_t rows = g.end - o, columns = x.end - i;
    auto* values = reinterpret_cast<R*>(cells);
    if (output.sink.is_double) {
      flush(values, static_cast<double*>(output.sink.data) + offset, I, rows, columns, output.scale);
    } else {
      flush(values, static_cast<float*>(output.sink.data) + offset, I, rows, columns, output.scale);
    }
  }

  void flush_all() const {
    flush_to(target.squares, problem.squares);
    flush_to(target.sums, problem.sums);
  }
};

template <class S>
void linear_tile(const LinearProblem<S>& problem, int64_t index) {
  Tile<S> tile{problem, index};
  tile.allocate();
  Cursor cursor;
  Block block;
  for (int64_t blocks = 1; problem.product ? cursor.next_rows(problem.samples.T, block) : cursor.next_samples(problem.samples, block);
       ++blocks) {
    tile.multiply(block);
    if (blocks % kFlush == 0) tile.flush_all();
  }
  tile.flush_all();
}

template <class S>
LinearKernel<S> linear_kernel() {
  return {kBlockRows, Lanes<compute_t<S>>::columns, &linear_tile<S>};
}
