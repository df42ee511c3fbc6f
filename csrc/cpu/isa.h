// SPDX-License-Identifier: Apache-2.0
// Which instruction set the CPU kernels run with: chosen when first asked, from what the processor has.
#pragma once

namespace fisherfast {

enum class Isa { portable, avx2, avx512 };

Isa isa();

}  // namespace fisherfast

// The version of a kernel function (a name inside the namespaces of each_isa.h) for the chosen instruction set.
#if defined(__x86_64__)
#define FISHERFAST_PICK(...)                                                    \
  (isa() == Isa::avx512 ? &avx512::__VA_ARGS__ : isa() == Isa::avx2 ? &avx2::__VA_ARGS__ : &portable::__VA_ARGS__)
#else
#define FISHERFAST_PICK(...) (&portable::__VA_ARGS__)
#endif
