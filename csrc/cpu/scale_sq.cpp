// SPDX-License-Identifier: Apache-2.0
// acc[d] += scale * sum_n w_n (sum_t g[n,t,d] x[n,t,d])^2: one read of g and x, spread over slices of D and chunks of samples.
#include <algorithm>
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

template <bool kHasX, class S>
void run(const ScaleProblem<S>& problem, const Sink& acc, const Sink& total, double scale) {
  const int64_t N = problem.samples.N, D = problem.g.width;
  const int64_t chunk = std::max(kMinChunk, (N + kMaxChunks - 1) / kMaxChunks), chunks = (N + chunk - 1) / chunk;
  std::vector<double> squares(chunks * D), sums(total ? chunks * D : 0);
  const auto part = FISHERFAST_PICK(scale_part<kHasX, S>);
  for_slices(chunks, D, problem.samples.M * D, [&](int64_t index, int64_t begin, int64_t end) {
    part(problem, index * chunk, std::min(index * chunk + chunk, N), begin, end, squares.data() + index * D,
         total ? sums.data() + index * D : nullptr);
  });
  add_chunks(acc, squares, D, scale);
  add_chunks(total, sums, D, 1.0);
}

void scale_sq(Tensor acc, OptionalTensor x, Tensor g, double scale, OptionalTensor weight, OptionalTensor offsets, OptionalTensor total,
              OptionalTensor sqnorm, OptionalTensor flag) {
  const Samples samples = samples_of(g, offsets);
  if (stopped(flag, g, x, weight)) return;
  check_offsets(samples);
  if (samples.M == 0 || acc.numel() == 0) return;
  dispatch_input("scale_sq_", g.scalar_type(), [&](auto type) {
    using S = typename decltype(type)::type;
    SliceNorms norms(sqnorm, samples.N, acc.numel());
    const ScaleProblem<S> problem{rows_of<S>(g), x ? rows_of<S>(*x) : Rows<S>{}, samples, data_or_null<const float>(weight),
                                  sqnorm ? &norms : nullptr};
    if (x) {
      run<true>(problem, sink_of(acc), sink_of(total), scale);
    } else {
      run<false>(problem, sink_of(acc), sink_of(total), scale);
    }
    norms.finish();
  });
}

}  // namespace
}  // namespace fisherfast

STABLE_TORCH_LIBRARY_FRAGMENT(fisherfast_cpp, m) {
  m.def("scale_sq_(Tensor(a!) acc, Tensor? x, Tensor g, " FISHERFAST_OUTPUTS ") -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(fisherfast_cpp, CPU, m) { m.impl("scale_sq_", TORCH_BOX(&fisherfast::scale_sq)); }
