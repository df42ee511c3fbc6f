// SPDX-License-Identifier: Apache-2.0
// acc[o,i] += scale * sum_n w_n (sum_t g[n,t,o] x[n,t,i])^2, the sample gradients never leaving the L2 cache.
//
// Where T = 1 the squares are taken of g and x first, and one matrix product over the samples is left: by our tiles, or by
// the BLAS (cpu/blas.h) where that is faster.
#include "cpu/linear_sq.h"

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <utility>
#include <vector>

#include "cpu/blas.h"

#define FISHERFAST_KERNEL "cpu/linear_sq_kernel.h"
#define FISHERFAST_WITH_AMX
#include "cpu/each_isa.h"

namespace fisherfast {
namespace {

constexpr int64_t kNormSamples = 1024;  // samples per pass where sqnorm is asked for: bounds its partial sums

template <class S>
TileKernel<LinearProblem<S>> kernel_of(const LinearProblem<S>& problem, const Samples& samples) {
  return FISHERFAST_PICK_TILES(compute_t<S>, matrix_registers_pay(samples, problem.g.width, problem.x.width), linear_kernel<S>);
}

template <class S>
void run(LinearProblem<S> problem, const TileKernel<LinearProblem<S>>& kernel, const Sink& sqnorm, int64_t first_sample) {
  const int64_t threads = threads_for(problem.samples.M * problem.g.width * problem.x.width);
  problem.tiling = plan(problem, problem.g.width, problem.x.width, kernel.block_rows, kernel.block_columns, sizeof(compute_t<S>),
                        threads, false);
  run_tiles(problem, kernel, threads, sqnorm, first_sample);
}

template <class S>
void per_sample(LinearProblem<S> problem, const Sink& sqnorm) {
  const Samples all = problem.samples;
  for (int64_t n = 0; n < all.N; ++n) problem.longest = std::max(problem.longest, all.rows(n));
  problem.flush_every = blocks_per_flush(most_blocks(all), problem.flush_every);
  const auto kernel = kernel_of(problem, all);
  if (!sqnorm) return run(problem, kernel, sqnorm, 0);
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
    run(part, kernel, sqnorm, first);
  }
}

// out += scale * sum_n w_n g_n^T x_n, or of the squares of g and x, by the BLAS. Tiles and chains of additions (kBlasRun samples,
// then blocks of kBlasSamples, then out) do not depend on the number of threads, so the sums do not.
void blas_product(const LinearProblem<float>& problem, const Output& out) {
  constexpr int64_t kTileRows = 256, kTileColumns = 512, kBlasRun = 32, kBlasSamples = 256;
  constexpr int64_t kGrain = 1 << 15;  // elements below which a second thread does not pay
  const int64_t N = problem.samples.N, O = problem.g.width, I = problem.x.width;
  const SharedScratch memory(std::min(N, kBlasSamples) * (O + I) * sizeof(float));
  float *g = static_cast<float*>(memory.data()), *x = g + std::min(N, kBlasSamples) * O;
  const auto factor_row = FISHERFAST_PICK(factor_row);
  const auto add_rows = FISHERFAST_PICK(add_rows);
  const int64_t across = ceil_div(I, kTileColumns), tiles = ceil_div(O, kTileRows) * across;
  for (int64_t first = 0; first < N; first += kBlasSamples) {
    const int64_t count = std::min(kBlasSamples, N - first);
    torch::stable::parallel_for(0, count, ceil_div(kGrain, O + I), [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        factor_row(problem.g, first + n, problem.weight ? problem.weight[first + n] : 1.0f, problem.squared, g + n * O);
        factor_row(problem.x, first + n, 1.0f, problem.squared, x + n * I);
      }
    });
    torch::stable::parallel_for(0, tiles, 1, [&](int64_t begin, int64_t end) {
      for (int64_t tile = begin; tile < end; ++tile) {
        const int64_t o = tile / across * kTileRows, i = tile % across * kTileColumns;
        const int64_t rows = std::min(kTileRows, O - o), columns = std::min(kTileColumns, I - i);
        auto* sums = static_cast<float*>(scratch(rows * columns * sizeof(float)));
        for (int64_t n = 0; n < count; n += kBlasRun)
          multiply(std::min(kBlasRun, count - n), rows, columns, {g + n * O + o, O}, {x + n * I + i, I}, n > 0, sums);
        add_rows(sums, rows, columns, static_cast<float>(out.scale), static_cast<float*>(out.sink.data) + o * I + i, I);
      }
    });
  }
}

Samples as_one_sample(const Samples& positions) { return {1, positions.N, positions.N, nullptr}; }

// Matrix registers are faster still; but with few samples most of the work is adding to the result, which it does better. Of
// narrow factors it makes one chain of additions, whatever its runs.
bool blas_pays(const LinearProblem<float>& problem) {
  constexpr int64_t kFewSamples = 128, kNarrow = 48;
  if (std::min(problem.g.width, problem.x.width) < kNarrow) return false;
  const bool registers_pay = matrix_registers_pay(as_one_sample(problem.samples), problem.g.width, problem.x.width);
  return uses_blas() && !(registers_pay && problem.samples.N >= kFewSamples);
}

// The same by our own tiles: for them, sums over samples of a chain's rows.
template <class S>
void tiled_product(LinearProblem<S> problem, const Output& out) {
  const int64_t N = problem.samples.N;
  const auto kernel = kernel_of(problem, as_one_sample(problem.samples));
  std::vector<int64_t> offsets;
  for (int64_t row = 0; row < N; row += kernel.chain) offsets.push_back(row);
  offsets.push_back(N);
  problem.samples = {static_cast<int64_t>(offsets.size()) - 1, 0, N, offsets.data()};
  problem.flush_every = blocks_per_flush(ceil_div(N, kDepth), 8);
  problem.g.stride_t = problem.g.stride_n;
  problem.x.stride_t = problem.x.stride_n;
  problem.row_weight = std::exchange(problem.weight, nullptr);
  problem.squares = {};
  problem.sums = out;
  run(problem, kernel, {}, 0);
}

template <class S>
void product(LinearProblem<S> problem, const Output& out, bool squared) {
  if (!out.sink) return;
  problem.squared = squared;
  if constexpr (std::is_same_v<S, float>)
    if (!out.sink.is_double && blas_pays(problem)) return blas_product(problem, out);
  tiled_product(problem, out);
}

// |g_n|^2 |x_n|^2 of all samples.
template <class S>
std::vector<double> outer_norms(const LinearProblem<S>& problem) {
  std::vector<double> norms(problem.samples.N);
  const auto square = FISHERFAST_PICK(row_square<S>);
  torch::stable::parallel_for(0, problem.samples.N, 16, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) norms[n] = square(problem.g, n) * square(problem.x, n);
  });
  return norms;
}

// T = 1: a sample gradient is the outer product g_n x_n^T, and its square that of the squares. What is left is a product of
// matrices. Norms that are finite are of finite inputs, which then need not be read for the flag.
template <class S, class Stopped>
void outer_products(const LinearProblem<S>& problem, const Sink& sqnorm, const Stopped& stopped) {
  const std::vector<double> norms = sqnorm ? outer_norms(problem) : std::vector<double>();
  const bool finite =
      sqnorm && !problem.weight && std::all_of(norms.begin(), norms.end(), [](double norm) { return std::isfinite(norm); });
  if (!finite && stopped()) return;
  for (std::size_t n = 0; n < norms.size(); ++n) add_to(sqnorm, n, norms[n]);
  product(problem, problem.squares, true);
  product(problem, problem.sums, false);
}

void linear_sq(Tensor acc, Tensor x, Tensor g, double scale, OptionalTensor weight, OptionalTensor offsets, OptionalTensor total,
               OptionalTensor sqnorm, OptionalTensor flag) {
  const Samples samples = samples_of(g, offsets);
  if (raised(flag)) return;
  const auto not_finite = [&] { return stopped(flag, g, x, weight); };
  const bool any = samples.M > 0 && acc.numel() > 0, by_norms = any && samples.T == 1;
  if (!by_norms && not_finite()) return;
  check_offsets(samples);
  if (!any) return;
  dispatch_input("linear_sq_", g.scalar_type(), [&](auto type) {
    using S = typename decltype(type)::type;
    LinearProblem<S> problem{
        {samples, data_or_null<const float>(weight), {sink_of(acc), scale}, {sink_of(total), 1.0}}, rows_of<S>(g), rows_of<S>(x)};
    if (by_norms) {
      outer_products(problem, sink_of(sqnorm), not_finite);
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
