// SPDX-License-Identifier: Apache-2.0
// acc += (sum log(1 + c f), sum log(1 + c f) - c f / (1 + c f)): one read of f, widened run by run.
#include "cpu/log1p_sum.h"

#include <algorithm>
#include <limits>

#include "cpu/lines.h"

#define FISHERFAST_KERNEL "cpu/log1p_sum_kernel.h"
#include "cpu/each_isa.h"

namespace fisherfast {
namespace {

Log1pSums add_up(const Log1pSums* parts, std::size_t count) {
  if (count == 1) return *parts;
  Log1pSums sums = add_up(parts, count / 2);
  return sums += add_up(parts + count / 2, count - count / 2);
}

void log1p_sum(Tensor acc, Tensor f, double c) {
  constexpr int64_t kPart = 16 * kLog1pRun;  // elements of a part, whose sums do not depend on the number of threads
  if (f.numel() == 0) return;
  const Lines lines(f, Repeated::counted);
  const Log1pKernel run = log1p_kernel();
  std::vector<Log1pSums> parts((lines.size() + kPart - 1) / kPart);
  dispatch_accumulator("log1p_sum", f.scalar_type(), [&](auto type) {
    using S = typename decltype(type)::type;
    const auto* data = static_cast<const S*>(f.const_data_ptr());
    torch::stable::parallel_for(0, static_cast<int64_t>(parts.size()), 1, [&](int64_t first, int64_t last) {
      double values[kLog1pRun];
      for (int64_t begin = first * kPart; begin < std::min(last * kPart, lines.size()); begin += kLog1pRun) {
        double* to = values;
        lines.visit(begin, std::min(begin + kLog1pRun, lines.size()), [&](int64_t offset, int64_t count, int64_t stride) {
          for (int64_t i = 0; i < count; ++i) *to++ = data[offset + i * stride];
        });
        const int64_t count = log1p_padded(to - values);
        std::fill(to, values + count, 0.0);
        parts[begin / kPart] += run(c, values, count);
      }
    });
  });
  add_log1p_sums(acc, parts);
}

}  // namespace

Log1pKernel log1p_kernel() { return FISHERFAST_PICK(log1p_sums); }

void add_log1p_sums(const Tensor& acc, const std::vector<Log1pSums>& parts) {
  const Log1pSums sums = add_up(parts.data(), parts.size());
  auto* to = acc.mutable_data_ptr<double>();
  to[0] += sums.log;
  to[1] += sums.cost;
}

}  // namespace fisherfast

STABLE_TORCH_LIBRARY_FRAGMENT(fisherfast_cpp, m) { m.def("log1p_sum(Tensor(a!) acc, Tensor f, float c=1.0) -> ()"); }
STABLE_TORCH_LIBRARY_IMPL(fisherfast_cpp, CPU, m) { m.impl("log1p_sum", TORCH_BOX(&fisherfast::log1p_sum)); }
