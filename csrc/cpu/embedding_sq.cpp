// SPDX-License-Identifier: Apache-2.0
// acc[v,d] += scale * sum_n w_n (sum_{t: ids[n,t] = v} g[n,t,d])^2: positions are sorted by id, then sample, so that a row of
// the table is read and written once, and only if it occurs.
#include <algorithm>
#include <array>
#include <numeric>
#include <utility>
#include <vector>

#include "cpu/slices.h"

namespace fisherfast {

// Position t of sample n uses row id of the table.
struct Use {
  int64_t id, n, t;
};

template <class S>
struct EmbeddingProblem {
  Rows<S> g;
  Samples samples;
  const Use* uses;      // [M], by id, then n, then t
  const float* weight;  // [N] or null
  Sink acc, total;
  double scale;
  SliceNorms* norms;  // or null
  int64_t padding_idx;
};

}  // namespace fisherfast

#define FISHERFAST_KERNEL "cpu/embedding_sq_kernel.h"
#include "cpu/each_isa.h"

namespace fisherfast {
namespace {

std::vector<Use> uses_of(const Tensor& ids, const Samples& samples) {
  std::vector<Use> uses;
  uses.reserve(samples.M);
  const auto* data = ids.const_data_ptr<int64_t>();
  const int64_t stride_n = ids.stride(0), stride_t = ids.stride(ids.dim() - 1);
  for (int64_t n = 0; n < samples.N; ++n) {
    const int64_t* sample = data + (samples.offsets ? samples.offsets[n] * stride_t : n * stride_n);
    for (int64_t t = 0; t < samples.rows(n); ++t) uses.push_back({sample[t * stride_t], n, t});
  }
  return uses;
}

void check_ids(const std::vector<Use>& uses, int64_t V) {
  const auto by_id = [](const Use& a, const Use& b) { return a.id < b.id; };
  const auto [least, most] = std::minmax_element(uses.begin(), uses.end(), by_id);
  if (!uses.empty() && (least->id < 0 || most->id >= V))
    value_error("embedding_sq_: ids must lie in [0, V = ", V, "), got ", least->id, " .. ", most->id);
}

// By digits, least first: stable, so n and t keep their order.
void sort_by_id(std::vector<Use>& uses, int64_t V) {
  constexpr int kBits = 11;
  std::vector<Use> sorted(uses.size());
  for (int shift = 0; (V - 1) >> shift > 0; shift += kBits) {
    const auto digit = [&](const Use& use) { return (use.id >> shift) & ((1 << kBits) - 1); };
    std::array<int64_t, (1 << kBits) + 1> start{};
    for (const Use& use : uses) ++start[digit(use) + 1];
    std::partial_sum(start.begin(), start.end(), start.begin());
    for (const Use& use : uses) sorted[start[digit(use)]++] = use;
    uses.swap(sorted);
  }
}

void embedding_sq(Tensor acc, Tensor ids, Tensor g, double scale, OptionalTensor weight, OptionalTensor offsets,
                  OptionalTensor total, OptionalTensor sqnorm, OptionalTensor flag, int64_t padding_idx) {
  const Samples samples = samples_of(g, offsets);
  check_offsets(samples);
  std::vector<Use> uses = uses_of(ids, samples);
  check_ids(uses, acc.size(0));
  if (stopped(flag, g, std::nullopt, weight)) return;
  if (samples.M == 0 || acc.numel() == 0) return;
  sort_by_id(uses, acc.size(0));
  const int64_t D = acc.size(1);
  SliceNorms norms(sqnorm, samples.N, D);
  dispatch_input("embedding_sq_", g.scalar_type(), [&](auto type) {
    using S = typename decltype(type)::type;
    const EmbeddingProblem<S> problem{rows_of<S>(g), samples,        uses.data(), data_or_null<const float>(weight),
                                      sink_of(acc),  sink_of(total), scale,       sqnorm ? &norms : nullptr,
                                      padding_idx};
    const auto part = FISHERFAST_PICK(embedding_part<S>);
    for_slices(1, D, samples.M * D, [&](int64_t, int64_t begin, int64_t end) { part(problem, begin, end); });
  });
  norms.finish();
}

}  // namespace
}  // namespace fisherfast

STABLE_TORCH_LIBRARY_FRAGMENT(fisherfast_cpp, m) {
  m.def("embedding_sq_(Tensor(a!) acc, Tensor ids, Tensor g, " FISHERFAST_OUTPUTS ", int padding_idx=-1) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(fisherfast_cpp, CPU, m) { m.impl("embedding_sq_", TORCH_BOX(&fisherfast::embedding_sq)); }
