// SPDX-License-Identifier: Apache-2.0
// acc[o,i] += scale * sum_n w_n (sum_t g[n,t,o] x[n,t,i])^2, the sample gradients never leaving the L2 cache.
//
// [O, I] is cut into tiles; a thread takes a tile, walks the samples, and keeps what it adds in its own fp32 copy of the
// tile. Where T = 1 the squares are taken of g and x first, and one matrix product over the samples is left.
#include "cpu/linear_sq.h"

#include <atomic>
#include <utility>
#include <vector>

#define FISHERFAST_KERNEL "cpu/linear_sq_kernel.h"
#include "cpu/each_isa.h"

namespace fisherfast {
namespace {

constexpr int64_t kNormSamples = 1024;  // samples per pass where sqnorm is asked for: bounds its partial sums
constexpr int64_t kProductsPerThread = 1 << 20;  // with fewer, a second thread does not pay
constexpr int64_t kNormWorkers = 16;    // tiles do not depend on the number of threads where their sums would

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The cheapest of the few ways to cut [O, I] into tiles that fit: time is that of the busiest worker.
Tiling plan(int64_t O, int64_t I, int64_t block_rows, int64_t block_columns, int64_t max_rows, int64_t workers) {
  constexpr int64_t kOperandCost = 10;  // bringing an operand's element to the core, in multiply-adds
  const int64_t more = std::min<int64_t>(workers, 16);
  const int64_t row_blocks = ceil_div(O, block_rows), column_blocks = ceil_div(I, block_columns);
  const int64_t least_down = ceil_div(O, max_rows), least_across = ceil_div(I, kMaxTileColumns / block_columns * block_columns);
  Tiling best{};
  int64_t least = INT64_MAX;
  for (int64_t down = least_down; down <= std::min(row_blocks, least_down + more); ++down)
    for (int64_t across = least_across; across <= std::min(column_blocks, least_across + more); ++across) {
      const int64_t rows = ceil_div(row_blocks, down) * block_rows, columns = ceil_div(column_blocks, across) * block_columns;
      const int64_t tiles = ceil_div(O, rows) * ceil_div(I, columns);
      const int64_t cost = ceil_div(tiles, workers) * (rows * columns + kOperandCost * (rows + columns));
      if (cost < least) {
        least = cost;
        best = {rows, columns, ceil_div(O, rows), ceil_div(I, columns)};
      }
    }
  return best;
}

// A tile is as high as its buffers (sums and an unfinished sample want their own) leave room for in L2.
template <class R>
int64_t max_rows(int64_t buffers) {
  return kMaxTileRows * static_cast<int64_t>(sizeof(float)) / (static_cast<int64_t>(sizeof(R)) * buffers);
}

template <class S>
void run(LinearProblem<S> problem, const Sink& sqnorm, int64_t first_sample) {
  const LinearKernel<S> kernel = FISHERFAST_PICK(linear_kernel<S>)();
  const int64_t products = problem.samples.M * problem.g.width * problem.x.width;
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), 1 + products / kProductsPerThread);
  const int64_t buffers = (problem.squares.sink && problem.sums.sink) + (problem.longest > kDepth) + 1;
  problem.tiling = plan(problem.g.width, problem.x.width, kernel.block_rows, kernel.block_columns,
                        max_rows<compute_t<S>>(buffers), sqnorm ? kNormWorkers : threads);
  const int64_t tiles = problem.tiling.down * problem.tiling.across, N = problem.samples.N;
  std::vector<double> norms(sqnorm ? tiles * N : 0);
  if (sqnorm) problem.norms = norms.data();
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, std::min(threads, tiles), 1, [&](int64_t, int64_t) {
    for (int64_t tile = next++; tile < tiles; tile = next++) kernel.tile(problem, tile);
  });
  for (int64_t n = 0; sqnorm && n < N; ++n) {
    double norm = 0;
    for (int64_t tile = 0; tile < tiles; ++tile) norm += norms[tile * N + n];
    add_to(sqnorm, first_sample + n, norm);
  }
}

template <class S>
void per_sample(LinearProblem<S> problem, const Sink& sqnorm) {
  const Samples all = problem.samples;
  for (int64_t n = 0; n < all.N; ++n) problem.longest = std::max(problem.longest, all.rows(n));
  if (!sqnorm) return run(problem, sqnorm, 0);
  for (int64_t first = 0; first < all.N; first += kNormSamples) {
    LinearProblem<S> part = problem;
    part.samples.N = std::min(kNormSamples, all.N - first);
    if (all.offsets) {
      part.samples.offsets += first;
    } else {
      part.g.data += first * part.g.stride_n;
      part.x.data += first * part.x.stride_n;
    }
    if (part.weight) part.weight += first;
    run(part, sqnorm, first);
  }
}

template <class S>
double row_square(const Rows<S>& rows, int64_t n) {
  double sum = 0;
  for (int64_t d = 0; d < rows.width; ++d) {
    const double value = widen(rows.data[n * rows.stride_n + d * rows.stride_d]);
    sum += value * value;
  }
  return sum;
}

// T = 1: a sample gradient is the outer product g_n x_n^T, and its square that of the squares. What is left is a product of
// matrices: for the kernel, sums over N / kRun samples of kRun rows.
template <class S>
void outer_products(LinearProblem<S> problem, const Sink& sqnorm) {
  const int64_t N = problem.samples.N;
  if (sqnorm) {
    torch::stable::parallel_for(0, N, 16, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) add_to(sqnorm, n, row_square(problem.g, n) * row_square(problem.x, n));
    });
  }
  std::vector<int64_t> offsets;
  for (int64_t row = 0; row < N; row += kRun) offsets.push_back(row);
  offsets.push_back(N);
  const LinearOutput squares = problem.squares, sums = problem.sums;
  problem.samples = {static_cast<int64_t>(offsets.size()) - 1, 0, N, offsets.data()};
  problem.flush_every = 2;  // a block holds only four such samples: chains of 32, 8, and what is left
  problem.g.stride_t = problem.g.stride_n;
  problem.x.stride_t = problem.x.stride_n;
  problem.row_weight = std::exchange(problem.weight, nullptr);
  problem.squares = {};
  problem.sums = squares;
  problem.squared = true;
  run(problem, {}, 0);
  if (!sums.sink) return;
  problem.sums = sums;
  problem.squared = false;
  run(problem, {}, 0);
}

void linear_sq(Tensor acc, Tensor x, Tensor g, double scale, OptionalTensor weight, OptionalTensor offsets, OptionalTensor total,
               OptionalTensor sqnorm, OptionalTensor flag) {
  const Samples samples = samples_of(g, offsets);
  if (stopped(flag, samples, g, x, weight)) return;
  check_offsets(samples);
  if (samples.M == 0 || acc.numel() == 0) return;
  dispatch_input("linear_sq_", g.scalar_type(), [&](auto type) {
    using S = typename decltype(type)::type;
    LinearProblem<S> problem{rows_of<S>(g), rows_of<S>(x), samples, data_or_null<const float>(weight),
                             {sink_of(acc), scale}, {sink_of(total), 1.0}};
    if (samples.T == 1) {
      outer_products(problem, sink_of(sqnorm));
    } else {
      per_sample(problem, sink_of(sqnorm));
    }
  });
}

}  // namespace
}  // namespace fisherfast

STABLE_TORCH_LIBRARY_FRAGMENT(fisherfast_cpp, m) {
  m.def("linear_sq_(Tensor(a!) acc, Tensor x, Tensor g, " FISHERFAST_OUTPUTS ") -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(fisherfast_cpp, CPU, m) { m.impl("linear_sq_", TORCH_BOX(&fisherfast::linear_sq)); }
