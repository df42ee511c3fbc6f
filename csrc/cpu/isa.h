// SPDX-License-Identifier: Apache-2.0
// Which instruction set the CPU kernels run with: chosen when first asked, from what the processor has.
#pragma once

// Tests emulate the matrix registers (tests/amx_on_cpu); an assembler that knows them came with that header.
#if defined(__x86_64__) && (defined(FISHERFAST_EMULATED_AMX) || __has_include(<amxbf16intrin.h>))
#define FISHERFAST_HAS_AMX
#endif

namespace fisherfast {

enum class Isa { portable, avx2, avx512, amx };  // amx: avx512, and matrix registers for bfloat16

Isa isa();

}  // namespace fisherfast

// The version of a kernel function (a name inside the namespaces of each_isa.h) for the chosen instruction set.
#if defined(__x86_64__)
#define FISHERFAST_PICK(...) \
  (isa() >= Isa::avx512 ? &avx512::__VA_ARGS__ : isa() == Isa::avx2 ? &avx2::__VA_ARGS__ : &portable::__VA_ARGS__)
#else
#define FISHERFAST_PICK(...) (&portable::__VA_ARGS__)
#endif

// The tiles of a kernel for operands in R, a function that returns their code and sizes; by matrix registers where they pay.
#if defined(FISHERFAST_HAS_AMX)
#define FISHERFAST_PICK_TILES(R, pays, ...)               \
  [](bool by_matrix_registers) {                          \
    if constexpr (std::is_same_v<R, float>)               \
      if (by_matrix_registers) return amx::__VA_ARGS__(); \
    return FISHERFAST_PICK(__VA_ARGS__)();                \
  }(pays)
#else
#define FISHERFAST_PICK_TILES(R, pays, ...) (static_cast<void>(pays), FISHERFAST_PICK(__VA_ARGS__)())
#endif
