// SPDX-License-Identifier: Apache-2.0
// Compiled once per instruction set by each_isa.h.

// An element is not finite where all bits of the exponent are set; no branch in the loop, so it becomes vector code.
template <class Bits>
bool all_finite(const Bits* data, int64_t count, int64_t stride, Bits exponent) {
  Bits bad = 0;
  if (stride == 1) {
    for (int64_t i = 0; i < count; ++i) bad |= (data[i] & exponent) == exponent;
  } else {
    for (int64_t i = 0; i < count; ++i) bad |= (data[i * stride] & exponent) == exponent;
  }
  return bad == 0;
}
