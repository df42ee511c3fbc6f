// SPDX-License-Identifier: Apache-2.0
// Compiled once per instruction set by each_isa.h: a tile of a symmetric product, and how its operands are brought.
#include "cpu/lanes.h"

#include "cpu/conv_images_kernel.h"

// As many accumulators as registers allow; panels are also read as rows, so their width is a multiple of a block's rows.
constexpr int kSymRows = kBlockRows == 6 ? 4 : kBlockRows, kSymVectors = kBlockRows == 6 ? 3 : kBlockVectors;
constexpr int kSymCells = kSymRows * kSymVectors;

// sum += one chain. Every loop over c is unrolled, or GCC keeps c in memory.
template <class R, int kVectors>
[[gnu::noinline]] void sym_chain(const R* left, int64_t left_stride, const R* right, int64_t right_stride, int64_t step,
                                 const Run* run, const Run* end, typename Lanes<R>::Vector* sum) {
  using Vector = typename Lanes<R>::Vector;
  using Unaligned = typename Lanes<R>::Unaligned;
  constexpr int kCount = kSymRows * kVectors;
  Vector c[kCount];
#pragma GCC unroll 32
  for (int k = 0; k < kCount; ++k) c[k] = Vector{};
  for (; run < end; ++run) {
    const R *l = left + run->first * left_stride, *r = right + run->first * right_stride;
    for (int64_t q = 0; q < run->count; ++q, l += step * left_stride, r += step * right_stride) {
      Vector b[kVectors];
#pragma GCC unroll 32
      for (int j = 0; j < kVectors; ++j) b[j] = reinterpret_cast<const Unaligned*>(r)[j];
#pragma GCC unroll 32
      for (int k = 0; k < kCount; ++k) c[k] += l[k / kVectors] * b[k % kVectors];
    }
  }
#pragma GCC unroll 32
  for (int k = 0; k < kCount; ++k) sum[k / kVectors * kSymVectors + k % kVectors] += c[k];
}

// Rows [row, row + kSymRows) of the channels by a panel of columns; or, from the last channel on, the row of ones.
template <class R>
struct SymTile {
  using Vector = typename Lanes<R>::Vector;
  static constexpr int64_t kLanes = Lanes<R>::count, kColumns = kSymVectors * kLanes;
  const SymProblem<R>& problem;
  int64_t group, row, column;  // the first ones
  int64_t rows, columns;

  SymTile(const SymProblem<R>& problem, int64_t group, int64_t row, int64_t panel)
      : problem(problem),
        group(group),
        row(row),
        column(panel * problem.width),
        rows(std::min<int64_t>(kSymRows, problem.channels - row)),
        columns(std::min(problem.width, problem.channels - column)) {}

  bool is_bias() const { return row >= problem.channels; }

  const R* panel(const R* operand, int64_t channel) const {
    return operand + (group * problem.panels + channel / problem.width) * problem.pixels * problem.width +
           channel % problem.width;
  }

  void run() const {
    std::size_t most = 0;
    for (const Shift& shift : *problem.shifts) most = std::max(most, shift.targets.size());
    auto* cells = static_cast<Vector*>(scratch(most * kSymCells * sizeof(Vector)));
    for (const Shift& shift : *problem.shifts) {
      if (shift.diagonal() ? !is_bias() && column + columns <= row : is_bias()) continue;
      std::memset(static_cast<void*>(cells), 0, shift.targets.size() * kSymCells * sizeof(Vector));
      for (const Region& region : shift.regions) multiply(shift, region, cells);
      if (problem.acc.is_double) {
        add(shift, cells, static_cast<double*>(problem.acc.data));
      } else {
        add(shift, cells, static_cast<float*>(problem.acc.data));
      }
    }
  }

  void multiply(const Shift& shift, const Region& region, Vector* cells) const {
    const auto chain = columns > 2 * kLanes ? sym_chain<R, kSymVectors> : columns > kLanes ? sym_chain<R, 2> : sym_chain<R, 1>;
    const R* left = is_bias() ? problem.ones : panel(problem.left, row);
    const R* right = panel(is_bias() ? problem.left : problem.right, column) + shift.pixels * problem.width;
    Vector sum[kSymCells]{};
    const Run* runs = region.runs.data();
    for (std::size_t i = 1; i < region.chains.size(); ++i)
      chain(left, is_bias() ? 0 : problem.width, right, problem.width, problem.step, runs + region.chains[i - 1],
            runs + region.chains[i], sum);
    for (const int64_t target : region.targets)
      for (int k = 0; k < kSymCells; ++k) cells[target * kSymCells + k] += sum[k];
  }

  template <class A>
  void add(const Shift& shift, const Vector* cells, A* acc) const {
    acc += group * problem.size * problem.size;
    for (std::size_t t = 0; t < shift.targets.size(); ++t) {
      const R* cell = reinterpret_cast<const R*>(cells + t * kSymCells);
      const auto [k, l] = shift.targets[t];
      if (is_bias()) {
        for (int64_t j = 0; j < columns; ++j) add(acc + ((column + j) * problem.K + k + 1) * problem.size - 1, cell[j]);
        continue;
      }
      for (int64_t i = 0; i < rows; ++i) {  // on and above the diagonal of the channels
        A* out = acc + ((row + i) * problem.K + k) * problem.size + l;
        for (int64_t j = std::max<int64_t>(0, row + i - column); j < columns; ++j)
          add(out + (column + j) * problem.K, cell[i * kColumns + j]);
      }
      if (shift.diagonal()) continue;
      for (int64_t j = 0; j < std::min(columns, row + rows - column); ++j) {  // and below: its mirror image
        A* out = acc + ((column + j) * problem.K + l) * problem.size + k;
        for (int64_t i = std::max<int64_t>(0, column + j - row + 1); i < rows; ++i)
          add(out + (row + i) * problem.K, cell[i * kColumns + j]);
      }
    }
  }

  template <class A>
  void add(A* out, R value) const {
    using Wide = std::common_type_t<A, R>;
    *out = static_cast<A>(*out + static_cast<Wide>(problem.scale) * static_cast<Wide>(value));
  }
};

template <class R>
void sym_tile(const SymProblem<R>& problem, int64_t group, int64_t row, int64_t panel) {
  SymTile<R>(problem, group, row, panel).run();
}

// Channels [first, first + count) of image n as a vector, zeros after them.
template <class S>
void bring_lanes(const Images<S>& images, int64_t n, int64_t first, int64_t count, compute_t<S>* out, int64_t pixel_stride) {
  constexpr int kLanes = Lanes<compute_t<S>>::count;
  const S* in = images.data + n * images.stride_n + first * images.stride_c;
  ChannelBlock<S, kLanes>{images, in, out, pixel_stride, static_cast<int>(count), kLanes}.bring();
}

template <class R>
void weigh(const R* in, R* out, int64_t count, R weight) {
  for (int64_t i = 0; i < count; ++i) out[i] = in[i] * weight;
}

template <class S>
SymKernel<S> sym_kernel() {
  using R = compute_t<S>;
  return {kSymRows, Lanes<R>::count, kSymVectors, &sym_tile<R>, &bring_lanes<S>, &weigh<R>};
}
