// SPDX-License-Identifier: Apache-2.0
// acc[i,j] += scale * sum_m w_m x[m,i] x[m,j] for j >= i: the tiles of linear_sq_ on and above the diagonal, for x by itself and
// nothing squared.
//
// Every sum is taken in pieces of kDepth rows, then kFlush pieces, then the accumulator or a share of the rows; none of it
// depends on tiles or threads, so neither does the result.
#include "cpu/gram.h"

#include <numeric>
#include <vector>

#define FISHERFAST_KERNEL "cpu/gram_kernel.h"
#define FISHERFAST_WITH_AMX
#include "cpu/each_isa.h"

namespace fisherfast {
namespace {

constexpr int64_t kLeastBlock = 16, kLargestWidth = 528;
constexpr int64_t kFlush = 16;
constexpr int64_t kNarrow = 256;  // with more columns there are tiles enough
constexpr int64_t kRowsOfShare = 2048, kMostShares = 32;

// Shares of the rows, where the accumulator is too small to be shared out itself.
int64_t shares_of(int64_t M, int64_t D) { return D > kNarrow ? 1 : std::clamp<int64_t>(M / kRowsOfShare, 1, kMostShares); }

// The multiply-adds until the last thread is done, if each takes the next tile when it is free, and a row so many in vain on the
// other side of the diagonal.
int64_t time_of(int64_t D, int64_t width, int64_t waste, int64_t threads) {
  constexpr int64_t kOperandCost = 15;  // bringing an operand's element to the core, in multiply-adds
  const int64_t side = ceil_div(D, width);
  std::vector<int64_t> busy(threads, 0);
  for (int64_t index = 0; index < side * (side + 1) / 2; ++index) {
    const TilePosition tile(index, side);
    const int64_t rows = std::min(width, D - tile.row * width), columns = std::min(width, D - tile.column * width);
    const bool on_diagonal = tile.row == tile.column;
    *std::min_element(busy.begin(), busy.end()) +=
        on_diagonal ? rows * (rows / 2 + waste + kOperandCost) : rows * columns + kOperandCost * (rows + columns);
  }
  return *std::max_element(busy.begin(), busy.end());
}

// The width of the tiles, a multiple of the block: the fastest of the few ways to cut the accumulator.
int64_t width_of(int64_t D, int64_t block, int64_t waste, int64_t threads, int64_t largest) {
  const int64_t blocks = ceil_div(D, block), least_side = ceil_div(D, largest);
  int64_t best = 0, least = INT64_MAX;
  for (int64_t side = least_side; side <= std::min(blocks, least_side + std::min<int64_t>(threads, 16)); ++side) {
    const int64_t width = ceil_div(blocks, side) * block, time = time_of(D, width, waste, threads);
    if (time < least) {
      least = time;
      best = width;
    }
  }
  return best;
}

// acc[i,j] += scale * sum_s partials[s,i,j] for j >= i, s rising.
template <class A, class R>
void fold(A* acc, const R* partials, int64_t shares, int64_t D, double scale) {
  torch::stable::parallel_for(0, D, std::max<int64_t>(1, 32768 / (D * shares)), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      for (int64_t j = i; j < D; ++j) {
        std::common_type_t<A, R> sum = 0;
        for (int64_t s = 0; s < shares; ++s) sum += partials[(s * D + i) * D + j];
        acc[i * D + j] += static_cast<A>(scale * sum);
      }
  });
}

template <class S>
void run(GramProblem<S> problem, int64_t shares, int64_t threads) {
  using R = compute_t<S>;
  const int64_t M = problem.layout.M, D = problem.D;
  std::vector<int64_t> pieces;
  for (int64_t row = 0; row < M; row += kDepth) pieces.push_back(row);
  pieces.push_back(M);
  problem.samples = {static_cast<int64_t>(pieces.size()) - 1, 0, M, pieces.data()};
  problem.flush_every = kFlush;
  const auto kernel = FISHERFAST_PICK_TILES(R, matrix_registers_pay(problem.samples, D, D), gram_kernel<S>);
  const int64_t largest = kLargestWidth * static_cast<int64_t>(sizeof(float)) / static_cast<int64_t>(sizeof(R));
  const int64_t block = std::lcm(kLeastBlock, std::lcm(kernel.block_rows, kernel.block_columns));
  const int64_t waste = (kernel.lanes + kernel.block_rows) / 2;
  const int64_t width = width_of(D, block, waste, std::max<int64_t>(1, threads / shares), largest);
  problem.side = ceil_div(D, width);
  problem.tiling = {width, width, problem.side * (problem.side + 1) / 2, 1, shares};
  if (shares == 1) return run_tiles(problem, kernel, threads, {}, 0);
  const SharedScratch memory(shares * D * D * sizeof(R));
  problem.partials = static_cast<R*>(memory.data());
  std::memset(memory.data(), 0, shares * D * D * sizeof(R));
  const Output acc = problem.sums;
  problem.sums = {{problem.partials, std::is_same_v<R, double>}, 1.0};
  run_tiles(problem, kernel, threads, {}, 0);
  if (acc.sink.is_double) {
    fold(static_cast<double*>(acc.sink.data), problem.partials, shares, D, acc.scale);
  } else {
    fold(static_cast<float*>(acc.sink.data), problem.partials, shares, D, acc.scale);
  }
}

void gram(Tensor acc, Tensor x, double scale, OptionalTensor weight, bool bias, OptionalTensor flag) {
  if (stopped(flag, x, {}, weight)) return;
  Samples layout = samples_of_rows(x);
  if (layout.M == 0 || acc.numel() == 0) return;
  dispatch_input("gram_", x.scalar_type(), [&](auto type) {
    using S = typename decltype(type)::type;
    Rows<S> rows = rows_of<S>(x);
    join_samples(rows, layout);
    GramProblem<S> problem{};
    problem.sums = {sink_of(acc), scale};
    problem.x = rows;
    problem.layout = layout;
    problem.row_weight = data_or_null<const float>(weight);
    problem.D = acc.size(0);
    const int64_t M = layout.M, D = problem.D;
    run(problem, shares_of(M, D), threads_for(M * D * D / 2));
  });
}

}  // namespace

template <class S>
void add_gram(const Rows<S>& x, int64_t M, compute_t<S>* out, int64_t threads) {
  GramProblem<S> problem{};
  problem.sums = {{out, std::is_same_v<compute_t<S>, double>}, 1.0};
  problem.x = x;
  problem.layout = {1, M, M, nullptr};
  problem.D = x.width;
  run(problem, 1, threads);
}

template void add_gram(const Rows<float>&, int64_t, float*, int64_t);
template void add_gram(const Rows<double>&, int64_t, double*, int64_t);
template void add_gram(const Rows<BFloat16>&, int64_t, float*, int64_t);
template void add_gram(const Rows<Half>&, int64_t, float*, int64_t);

}  // namespace fisherfast

STABLE_TORCH_LIBRARY_FRAGMENT(fisherfast_cpp, m) {
  m.def("gram_(Tensor(a!) acc, Tensor x, float scale=1.0, *, Tensor? weight=None, bool bias=False, Tensor(b!)? flag=None) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(fisherfast_cpp, CPU, m) { m.impl("gram_", TORCH_BOX(&fisherfast::gram)); }
