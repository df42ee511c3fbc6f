// SPDX-License-Identifier: Apache-2.0
// The float32 multiply-add rate of this processor, measured in registers: what the benchmark divides by.
#include <algorithm>
#include <chrono>
#include <vector>

#include "common.h"

#define FISHERFAST_KERNEL "cpu/peak_kernel.h"
#include "cpu/each_isa.h"

namespace fisherfast {
namespace {

// GFLOP/s of all threads together, over at least the given time.
double fma_peak_gflops(double seconds) {
  using Clock = std::chrono::steady_clock;
  const auto run = FISHERFAST_PICK(multiply_adds);
  const int64_t threads = torch::stable::get_num_threads();
  std::vector<double> rate(threads, 0.0);
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    const auto start = Clock::now();
    double flops = 0, elapsed = 0;
    while (elapsed < seconds) {
      flops += run(100000);
      elapsed = std::chrono::duration<double>(Clock::now() - start).count();
    }
    for (int64_t i = begin; i < end; ++i) rate[i] = flops / elapsed / static_cast<double>(end - begin);
  });
  double sum = 0;
  for (const double r : rate) sum += r;
  return sum * 1e-9;
}

}  // namespace
}  // namespace fisherfast

STABLE_TORCH_LIBRARY_FRAGMENT(fisherfast_cpp, m) { m.def("fma_peak_gflops(float seconds) -> float"); }
STABLE_TORCH_LIBRARY_IMPL(fisherfast_cpp, CompositeExplicitAutograd, m) {
  m.impl("fma_peak_gflops", TORCH_BOX(&fisherfast::fma_peak_gflops));
}
