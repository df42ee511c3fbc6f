// SPDX-License-Identifier: Apache-2.0
// Compiled once per instruction set by each_isa.h.
#include "cpu/row_sums.h"

// Adds samples [first, last) to columns [begin, end) of squares and of sums (or null): both [D], not scaled yet.
template <bool kHasX, class S>
void scale_part(const ScaleProblem<S>& problem, int64_t first, int64_t last, int64_t begin, int64_t end, double* squares,
                double* sums) {
  const Rows<S>&g = problem.g, &x = problem.x;
  const int64_t width = end - begin;
  const bool lines = g.stride_t == 1 && g.stride_d != 1 && (!kHasX || x.stride_t == 1);  // channels first: each is a line
  auto* sample = static_cast<double*>(scratch(width * sizeof(double)));
  for (int64_t n = first; n < last; ++n) {
    const S* g_row = g.sample(problem.samples, n) + begin * g.stride_d;
    const S* x_row = kHasX ? x.sample(problem.samples, n) + begin * x.stride_d : nullptr;
    const int64_t T = problem.samples.rows(n);
    if (lines) {
      for (int64_t d = 0; d < width; ++d)
        sample[d] = sum_line<kHasX, S>(g_row + d * g.stride_d, kHasX ? x_row + d * x.stride_d : nullptr, T);
    } else {
      sum_rows<kHasX, S>(sample, T, width, g.stride_d, x.stride_d,
                         [&](int64_t t) { return std::pair(g_row + t * g.stride_t, x_row + t * x.stride_t); });
    }
    const double w = problem.weight ? problem.weight[n] : 1.0;
    for (int64_t d = 0; d < width; ++d) squares[begin + d] += w * sample[d] * sample[d];
    if (sums)
      for (int64_t d = 0; d < width; ++d) sums[begin + d] += w * sample[d];
    if (problem.norms) problem.norms->add(n, begin, end, SquareOf{sample});
  }
}
