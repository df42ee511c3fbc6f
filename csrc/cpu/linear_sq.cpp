// SPDX-License-Identifier: Apache-2.0
// acc[o,i] += scale * sum_n w_n (sum_t g[n,t,o] x[n,t,i])^2, the sample gradients never leaving the L2 cache.
//
// Where T = 1 the squares are taken of g and x first, and one matrix product over the samples is left.
#include "cpu/linear_sq.h"

#include <utility>
#include <vector>

#define FISHERFAST_KERNEL "cpu/linear_sq_kernel.h"
#include "cpu/each_isa.h"

namespace fisherfast {
namespace {

constexpr int64_t kNormSamples = 1024;  // samples per pass where sqnorm is asked for: bounds its partial sums

template <class S>
void run(LinearProblem<S> problem, const Sink& sqnorm, int64_t first_sample) {
  const auto kernel = FISHERFAST_PICK(linear_kernel<S>)();
  const int64_t threads = threads_for(problem.samples.M * problem.g.width * problem.x.width);
  problem.tiling = plan(problem, problem.g.width, problem.x.width, kernel.block_rows, kernel.block_columns, sizeof(compute_t<S>),
                        threads, false);
  run_tiles(problem, kernel, threads, sqnorm, first_sample);
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

// T = 1: a sample gradient is the outer product g_n x_n^T, and its square that of the squares. What is left is a product of
// matrices: for the kernel, sums over N / kRun samples of kRun rows.
template <class S>
void outer_products(LinearProblem<S> problem, const Sink& sqnorm) {
  const int64_t N = problem.samples.N;
  if (sqnorm) {
    const auto square = FISHERFAST_PICK(row_square<S>);
    torch::stable::parallel_for(0, N, 16, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) add_to(sqnorm, n, square(problem.g, n) * square(problem.x, n));
    });
  }
  std::vector<int64_t> offsets;
  for (int64_t row = 0; row < N; row += kRun) offsets.push_back(row);
  offsets.push_back(N);
  const Output squares = problem.squares, sums = problem.sums;
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
  if (stopped(flag, g, x, weight)) return;
  check_offsets(samples);
  if (samples.M == 0 || acc.numel() == 0) return;
  dispatch_input("linear_sq_", g.scalar_type(), [&](auto type) {
    using S = typename decltype(type)::type;
    LinearProblem<S> problem{{samples, data_or_null<const float>(weight), {sink_of(acc), scale}, {sink_of(total), 1.0}},
                             rows_of<S>(g), rows_of<S>(x)};
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
