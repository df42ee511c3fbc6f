// SPDX-License-Identifier: Apache-2.0
#include "cpu/cpu.h"

#include <cstdlib>
#include <new>
#include <sstream>
#include <utility>

namespace fisherfast {

namespace {

void* allocate(std::size_t bytes) {
  constexpr std::size_t kAlignment = 64;  // the widest vector register
  void* data = std::aligned_alloc(kAlignment, (bytes + kAlignment - 1) / kAlignment * kAlignment);
  if (!data) throw std::bad_alloc();
  return data;
}

struct Memory {
  void* data = nullptr;
  std::size_t size = 0;

  ~Memory() { std::free(data); }

  void* at_least(std::size_t bytes) {
    if (bytes > size) {
      std::free(std::exchange(data, nullptr));
      size = 0;
      data = allocate(bytes);
      size = bytes;
    }
    return data;
  }
};

constexpr std::size_t kMostKept = std::size_t{16} << 20;
thread_local Memory shared;

}  // namespace

void* scratch(std::size_t bytes) {
  thread_local Memory memory;
  return memory.at_least(bytes);
}

SharedScratch::SharedScratch(std::size_t bytes)
    : data_(bytes <= kMostKept ? shared.at_least(bytes) : allocate(bytes)), kept_(bytes <= kMostKept) {}

SharedScratch::~SharedScratch() {
  if (!kept_) std::free(data_);
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
