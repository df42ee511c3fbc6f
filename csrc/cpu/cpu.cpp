// SPDX-License-Identifier: Apache-2.0
#include "cpu/cpu.h"

#include <cstdlib>
#include <new>
#include <sstream>

namespace fisherfast {

namespace {

struct Memory {
  void* data = nullptr;
  std::size_t size = 0;

  ~Memory() { std::free(data); }
};

}  // namespace

void* scratch(std::size_t bytes) {
  constexpr std::size_t kAlignment = 64;  // the widest vector register
  thread_local Memory memory;
  if (bytes > memory.size) {
    std::free(memory.data);
    memory.data = std::aligned_alloc(kAlignment, (bytes + kAlignment - 1) / kAlignment * kAlignment);
    memory.size = memory.data ? bytes : 0;
    if (!memory.data) throw std::bad_alloc();
  }
  return memory.data;
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
