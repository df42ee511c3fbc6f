// SPDX-License-Identifier: Apache-2.0
// What the CPU ops share: accumulators of either width, widened rows, scratch memory, the flag and the check of offsets.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "common.h"

namespace fisherfast {

// acc, total or sqnorm: float32 or float64, or absent.
struct Sink {
  void* data = nullptr;
  bool is_double = false;

  explicit operator bool() const { return data != nullptr; }
};

inline Sink sink_of(const Tensor& tensor) { return {tensor.mutable_data_ptr(), tensor.scalar_type() == ScalarType::Double}; }
inline Sink sink_of(const OptionalTensor& tensor) { return tensor ? sink_of(*tensor) : Sink{}; }

inline void add_to(const Sink& sink, int64_t index, double value) {
  if (sink.is_double) {
    static_cast<double*>(sink.data)[index] += value;
  } else {
    static_cast<float*>(sink.data)[index] += static_cast<float>(value);
  }
}

inline float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// Written so that loops over them become vector code on every instruction set.
inline float widen(float value) { return value; }
inline double widen(double value) { return value; }
inline float widen(BFloat16 value) { return from_bits(static_cast<uint32_t>(value.x) << 16); }
inline float widen(Half value) {
  constexpr uint32_t kRebias = (127 - 15) << 23, kLargest = 0x7c00u << 13, kSmallest = 0x0400u << 13;
  const uint32_t sign = static_cast<uint32_t>(value.x & 0x8000) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(value.x & 0x7fff) << 13;
  const uint32_t normal = magnitude + kRebias + (magnitude >= kLargest ? kRebias : 0);
  // A subnormal is k 2^-24: as the low bits of a number just above 2^-14 it is exact, then 2^-14 is taken away.
  const float subnormal = from_bits(magnitude + kRebias + kSmallest) - from_bits(kRebias + kSmallest);
  return from_bits(sign | (magnitude < kSmallest ? to_bits(subnormal) : normal));
}

// Memory of the calling thread, kept between calls so that a call does not pay for page faults. Contents are undefined.
void* scratch(std::size_t bytes);

// The same for what a call shares among its threads: one at a time in a thread. Only a moderate size is kept.
class SharedScratch {
 public:
  explicit SharedScratch(std::size_t bytes);
  ~SharedScratch();
  SharedScratch(const SharedScratch&) = delete;
  SharedScratch& operator=(const SharedScratch&) = delete;

  void* data() const { return data_; }

 private:
  void* data_;
  bool kept_;
};

bool raised(const OptionalTensor& flag);

// Sets the flag where g, x or weight is not finite; true if nothing may be added.
bool stopped(const OptionalTensor& flag, const Tensor& g, const OptionalTensor& x, const OptionalTensor& weight);

// Raises unless offsets rise from 0 to M.
void check_offsets(const Samples& samples);

}  // namespace fisherfast
