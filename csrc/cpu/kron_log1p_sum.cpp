// SPDX-License-Identifier: Apache-2.0
// acc += (sum_ij log(1 + c a_i b_j), sum_ij log(1 + c a_i b_j) - c a_i b_j / (1 + c a_i b_j)): the products stay in registers.
#include <algorithm>
#include <utility>

#include "cpu/log1p_sum.h"

namespace fisherfast {
namespace {

// scale * vector in float64, filled up with zeros.
std::vector<double> widened(const Tensor& vector, double scale) {
  std::vector<double> values(log1p_padded(vector.numel()));
  dispatch_accumulator("kron_log1p_sum", vector.scalar_type(), [&](auto type) {
    const auto* data = static_cast<const typename decltype(type)::type*>(vector.const_data_ptr());
    for (int64_t i = 0; i < vector.numel(); ++i) values[i] = scale * data[i * vector.stride(0)];
  });
  return values;
}

void kron_log1p_sum(Tensor acc, Tensor a, Tensor b, double c) {
  constexpr int64_t kRows = 64;      // of a tile of kLog1pRun columns, whose sums do not depend on the number of threads
  constexpr int64_t kGrain = 16384;  // products below which a second thread does not pay
  if (a.numel() == 0 || b.numel() == 0) return;
  if (a.numel() > b.numel()) std::swap(a, b);
  const std::vector<double> factors = widened(a, c), values = widened(b, 1.0);
  const int64_t rows = a.numel(), columns = static_cast<int64_t>(values.size()), across = (columns + kLog1pRun - 1) / kLog1pRun;
  const Log1pKernel run = log1p_kernel();
  std::vector<Log1pSums> parts((rows + kRows - 1) / kRows * across);
  const int64_t grain = kGrain / (std::min(rows, kRows) * std::min(columns, kLog1pRun)) + 1;
  torch::stable::parallel_for(0, static_cast<int64_t>(parts.size()), grain, [&](int64_t first, int64_t last) {
    for (int64_t tile = first; tile < last; ++tile) {
      const int64_t row = tile / across * kRows, column = tile % across * kLog1pRun;
      for (int64_t i = row; i < std::min(row + kRows, rows); ++i)
        parts[tile] += run(factors[i], values.data() + column, std::min(kLog1pRun, columns - column));
    }
  });
  add_log1p_sums(acc, parts);
}

}  // namespace
}  // namespace fisherfast

STABLE_TORCH_LIBRARY_FRAGMENT(fisherfast_cpp, m) {
  m.def("kron_log1p_sum(Tensor(a!) acc, Tensor a, Tensor b, float c=1.0) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(fisherfast_cpp, CPU, m) { m.impl("kron_log1p_sum", TORCH_BOX(&fisherfast::kron_log1p_sum)); }
