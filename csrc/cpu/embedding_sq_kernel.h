// SPDX-License-Identifier: Apache-2.0
// Compiled once per instruction set by each_isa.h.
#include "cpu/row_sums.h"

template <class A>
void add_row(A* row, const double* values, int64_t width, double factor) {
  for (int64_t d = 0; d < width; ++d) row[d] = static_cast<A>(row[d] + factor * values[d]);
}

inline void add_row(const Sink& table, int64_t offset, const double* values, int64_t width, double factor) {
  if (table.is_double) {
    add_row(static_cast<double*>(table.data) + offset, values, width, factor);
  } else {
    add_row(static_cast<float*>(table.data) + offset, values, width, factor);
  }
}

// Adds columns [begin, end) of one row of the table: its uses, [first, last), are sorted by sample.
template <class S>
void embedding_row(const EmbeddingProblem<S>& problem, const Use* first, const Use* last, int64_t begin, int64_t end) {
  const Rows<S>& g = problem.g;
  const int64_t width = end - begin, offset = first->id * g.width + begin;
  auto* sample = static_cast<double*>(scratch(3 * width * sizeof(double)));
  double *squares = sample + width, *sums = squares + width;
  for (int64_t d = 0; d < width; ++d) squares[d] = sums[d] = 0;
  for (const Use *use = first, *next = first; use < last; use = next) {
    while (next < last && next->n == use->n) ++next;
    const S* rows = g.sample(problem.samples, use->n) + begin * g.stride_d;
    sum_rows<false, S>(sample, next - use, width, g.stride_d, 0,
                       [&](int64_t k) { return std::pair(rows + use[k].t * g.stride_t, static_cast<const S*>(nullptr)); });
    const double w = problem.weight ? problem.weight[use->n] : 1.0;
    for (int64_t d = 0; d < width; ++d) squares[d] += w * sample[d] * sample[d];
    for (int64_t d = 0; d < width; ++d) sums[d] += w * sample[d];
    if (problem.norms) problem.norms->add(use->n, begin, end, SquareOf{sample});
  }
  add_row(problem.acc, offset, squares, width, problem.scale);
  if (problem.total) add_row(problem.total, offset, sums, width, 1.0);
}

template <class S>
void embedding_part(const EmbeddingProblem<S>& problem, int64_t begin, int64_t end) {
  const Use* last = problem.uses + problem.samples.M;
  for (const Use *use = problem.uses, *next = use; use < last; use = next) {
    while (next < last && next->id == use->id) ++next;
    if (use->id != problem.padding_idx) embedding_row(problem, use, next, begin, end);
  }
}
