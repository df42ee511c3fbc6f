// SPDX-License-Identifier: Apache-2.0
// What log1p_sum and kron_log1p_sum share: the sums over one run of values, and adding the results of runs.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/cpu.h"

namespace fisherfast {

constexpr int64_t kLog1pRun = 1024;  // values added up in vector registers: in the first-level cache, short chains of additions
constexpr int64_t kLog1pPad = 8;     // lanes of the widest vector

struct Log1pSums {
  double log = 0, cost = 0;  // sum log(1 + s), sum log(1 + s) - s / (1 + s)

  Log1pSums& operator+=(const Log1pSums& other) {
    log += other.log;
    cost += other.cost;
    return *this;
  }
};

inline int64_t log1p_padded(int64_t count) { return (count + kLog1pPad - 1) / kLog1pPad * kLog1pPad; }

// Sums over s_j = factor * values[j], j < count: a multiple of kLog1pPad, filled up with zeros, which add nothing.
using Log1pKernel = Log1pSums (*)(double factor, const double* values, int64_t count);
Log1pKernel log1p_kernel();

// acc += the parts, added in pairs: one order always, and short chains.
void add_log1p_sums(const Tensor& acc, const std::vector<Log1pSums>& parts);

}  // namespace fisherfast
