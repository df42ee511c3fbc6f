// SPDX-License-Identifier: Apache-2.0
// acc[d] += scale * sum_n w_n (sum_t g[n,t,d] x[n,t,d])^2: one read of g and x, spread over slices of D and chunks of samples.
//
// What is not finite makes the squares of its column so: only then is there a second read, to tell it from an overflow.
#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "cpu/slices.h"

namespace fisherfast {

template <class S>
struct ScaleProblem {
  Rows<S> g, x;  // x: all zero where there is none
  Samples samples;
  const float* weight;  // [N] or null
  SliceNorms* norms;    // or null
};

}  // namespace fisherfast

#define FISHERFAST_KERNEL "cpu/scale_sq_kernel.h"
#include "cpu/each_isa.h"

namespace fisherfast {
namespace {

constexpr int64_t kMaxChunks = 16, kMinChunk = 64;  // of samples; they do not depend on the number of threads

void add_chunks(const Sink& sink, const std::vector<double>& parts, int64_t D, double scale) {
  for (int64_t d = 0; d < D && sink; ++d) {
    double sum = 0;
    for (std::size_t index = d; index < parts.size(); index += D) sum += parts[index];
    add_to(sink, d, scale * sum);
  }
}

// Of every chunk, [chunks, D].
struct Parts {
  std::vector<double> squares, sums;

  bool finite() const {
    return std::all_of(squares.begin(), squares.end(), [](double square) { return std::isfinite(square); });
  }
};

template <bool kHasX, class S>
Parts parts_of(const ScaleProblem<S>& problem, bool wants_sums) {
  const int64_t N = problem.samples.N, D = problem.g.width;
  const int64_t chunk = std::max(kMinChunk, (N + kMaxChunks - 1) / kMaxChunks), chunks = (N + chunk - 1) / chunk;
  Parts parts{std::vector<double>(chunks * D), std::vector<double>(wants_sums ? chunks * D : 0)};
  const auto part = FISHERFAST_PICK(scale_part<kHasX, S>);
  for_slices(chunks, D, problem.samples.M * D, [&](int64_t index, int64_t begin, int64_t end) {
    part(problem, index * chunk, std::min(index * chunk + chunk, N), begin, end, parts.squares.data() + index * D,
         wants_sums ? parts.sums.data() + index * D : nullptr);
  });
  return parts;
}

void scale_sq(Tensor acc, OptionalTensor x, Tensor g, double scale, OptionalTensor weight, OptionalTensor offsets,
              OptionalTensor total, OptionalTensor sqnorm, OptionalTensor flag) {
  const Samples samples = samples_of(g, offsets);
  if (raised(flag)) return;
  check_offsets(samples);
  if (samples.M == 0 || acc.numel() == 0) return static_cast<void>(stopped(flag, g, x, weight));
  dispatch_input("scale_sq_", g.scalar_type(), [&](auto type) {
    using S = typename decltype(type)::type;
    SliceNorms norms(sqnorm, samples.N, acc.numel());
    const ScaleProblem<S> problem{rows_of<S>(g), x ? rows_of<S>(*x) : Rows<S>{}, samples, data_or_null<const float>(weight),
                                  sqnorm ? &norms : nullptr};
    const Parts parts = x ? parts_of<true>(problem, total.has_value()) : parts_of<false>(problem, total.has_value());
    if (!parts.finite() && stopped(flag, g, x, weight)) return;
    add_chunks(sink_of(acc), parts.squares, acc.numel(), scale);
    add_chunks(sink_of(total), parts.sums, acc.numel(), 1.0);
    norms.finish();
  });
}

}  // namespace
}  // namespace fisherfast

STABLE_TORCH_LIBRARY_FRAGMENT(fisherfast_cpp, m) {
  m.def("scale_sq_(Tensor(a!) acc, Tensor? x, Tensor g, " FISHERFAST_OUTPUTS ") -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(fisherfast_cpp, CPU, m) { m.impl("scale_sq_", TORCH_BOX(&fisherfast::scale_sq)); }
