// SPDX-License-Identifier: Apache-2.0
// What the memory-bound ops share: threads own slices of D, so that nothing is written by two of them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/cpu.h"

namespace fisherfast {

constexpr int64_t kSlice = 64;  // columns: whole cache lines, and the grain of sqnorm's sums

inline int64_t slices_of(int64_t D) { return (D + kSlice - 1) / kSlice; }

// body(part, begin, end) for every part and, in as few pieces as threads allow, all columns [0, D) of it.
template <class Body>
void for_slices(int64_t parts, int64_t D, int64_t elements, const Body& body) {
  constexpr int64_t kGrain = 16384;  // elements below which a second thread does not pay
  const int64_t slices = slices_of(D), units = parts * slices;
  const int64_t grain = std::max<int64_t>(1, units * kGrain / std::max<int64_t>(elements, 1));
  torch::stable::parallel_for(0, units, grain, [&](int64_t first, int64_t last) {
    while (first < last) {
      const int64_t part = first / slices, slice = first % slices;
      const int64_t count = std::min(slices - slice, last - first);
      body(part, slice * kSlice, std::min((slice + count) * kSlice, D));
      first += count;
    }
  });
}

// |sample gradient|^2, summed within slices by the threads that own them and over slices at the end: in one order always.
class SliceNorms {
 public:
  SliceNorms(const OptionalTensor& sqnorm, int64_t N, int64_t D)
      : sink_(sink_of(sqnorm)), N_(N), norms_(sink_ ? N * slices_of(D) : 0) {}

  // Columns [begin, end) of a part of sample n's gradient: norm(d, count) is that of count of them, the first being begin + d;
  // begin is the start of a slice. The caller computes it: its code is that of the instruction set in use.
  template <class Norm>
  void add(int64_t n, int64_t begin, int64_t end, Norm norm) {
    for (int64_t start = begin; start < end; start += kSlice)
      norms_[start / kSlice * N_ + n] += norm(start - begin, std::min(kSlice, end - start));
  }

  void finish() const {
    for (int64_t n = 0; n < N_ && sink_; ++n) {
      double norm = 0;
      for (std::size_t index = n; index < norms_.size(); index += N_) norm += norms_[index];
      add_to(sink_, n, norm);
    }
  }

 private:
  Sink sink_;
  int64_t N_;
  std::vector<double> norms_;
};

}  // namespace fisherfast
