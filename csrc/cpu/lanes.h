// SPDX-License-Identifier: Apache-2.0
// Compiled once per instruction set by each_isa.h, as a part of its kernels: vectors of reals.

template <class R>
struct Lanes {
  static constexpr int count = kVectorBytes / sizeof(R);
  static constexpr int64_t columns = kBlockVectors * count;
  typedef R Vector __attribute__((vector_size(kVectorBytes)));
  typedef R Unaligned __attribute__((vector_size(kVectorBytes), aligned(alignof(R)), may_alias));
};
