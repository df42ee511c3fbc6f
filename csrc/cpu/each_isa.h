// SPDX-License-Identifier: Apache-2.0
// Includes the header FISHERFAST_KERNEL once per instruction set, each time in a namespace of that set's name. What such a
// header needs from elsewhere is included before this file: a template first seen inside a region would be compiled for
// that set, and the linker might keep that copy for everyone. (Target regions reach lambdas; target attributes do not.)
//
// kVectorBytes  one vector register;  kBlockRows x kBlockVectors  accumulators that fit the register file.
//
// Where FISHERFAST_WITH_AMX is defined, the header is also compiled with FISHERFAST_AMX: for processors with matrix registers.
#include "cpu/isa.h"

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,prfchw")
namespace fisherfast::avx512 {
constexpr int kVectorBytes = 64, kBlockRows = 8, kBlockVectors = 3;
#include FISHERFAST_KERNEL
}  // namespace fisherfast::avx512

#if defined(FISHERFAST_WITH_AMX) && defined(FISHERFAST_HAS_AMX)
#define FISHERFAST_AMX
namespace fisherfast::amx {
constexpr int kVectorBytes = 64, kBlockRows = 32, kBlockVectors = 2;
#include FISHERFAST_KERNEL
}  // namespace fisherfast::amx
#undef FISHERFAST_AMX
#endif
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace fisherfast::avx2 {
constexpr int kVectorBytes = 32, kBlockRows = 6, kBlockVectors = 2;
#include FISHERFAST_KERNEL
}  // namespace fisherfast::avx2
#pragma GCC pop_options
#endif

namespace fisherfast::portable {
constexpr int kVectorBytes = 16, kBlockRows = 4, kBlockVectors = 2;
#include FISHERFAST_KERNEL
}  // namespace fisherfast::portable
