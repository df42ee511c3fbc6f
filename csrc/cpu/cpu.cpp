// SPDX-License-Identifier: Apache-2.0
#include "cpu/cpu.h"

#include <cstdlib>
#include <memory>
#include <new>
#include <sstream>

namespace fisherfast {

void* scratch(std::size_t bytes) {
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  thread_local std::unique_ptr<void, Free> memory;
  thread_local std::size_t size = 0;
  if (bytes > size) {
    constexpr std::size_t kAlignment = 64;  // the widest vector register
    memory.reset();
    size = 0;
    memory.reset(std::aligned_alloc(kAlignment, (bytes + kAlignment - 1) / kAlignment * kAlignment));
    if (!memory) throw std::bad_alloc();
    size = bytes;
  }
  return memory.get();
}

void check_offsets(const Samples& samples) {
  if (!samples.offsets) return;
  bool rising = samples.offsets[0] == 0 && samples.offsets[samples.N] == samples.M;
  for (int64_t n = 0; n < samples.N; ++n) rising = rising && samples.rows(n) >= 0;
  if (rising) return;
  std::ostringstream list;
  for (int64_t n = 0; n <= samples.N; ++n) list << (n ? ", " : "") << samples.offsets[n];
  value_error("offsets: must rise from 0 to M = ", samples.M, ", got [", list.str(), "]");
}

}  // namespace fisherfast
