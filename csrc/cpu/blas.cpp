// SPDX-License-Identifier: Apache-2.0
#include "cpu/blas.h"

#include <atomic>
#include <optional>

#include "common.h"
#include "cpu/isa.h"

#if defined(__linux__) && defined(__x86_64__)
// BLAS's Fortran interface; null if nothing that torch is linked with has it. Not aten::addmm, which rounds its factors to
// bfloat16 after torch.set_float32_matmul_precision("medium").
extern "C" [[gnu::weak]] void sgemm_(const char* transpose_a, const char* transpose_b, const int* m, const int* n, const int* k,
                                     const float* alpha, const float* a, const int* lda, const float* b, const int* ldb,
                                     const float* beta, float* c, const int* ldc);

namespace fisherfast {
namespace {

bool exists() { return sgemm_ != nullptr; }

bool intel() {
  __builtin_cpu_init();
  return __builtin_cpu_is("intel");
}

}  // namespace

// Fortran's matrices are the transposes of ours: out^T += x^T g.
void multiply(int64_t N, int64_t O, int64_t I, BlasRows g, BlasRows x, bool keep, float* out) {
  const int m = static_cast<int>(I), n = static_cast<int>(O), k = static_cast<int>(N);
  const int lda = static_cast<int>(x.stride), ldb = static_cast<int>(g.stride);
  const float alpha = 1, beta = keep ? 1 : 0;
  sgemm_("N", "T", &m, &n, &k, &alpha, x.data, &lda, g.data, &ldb, &beta, out, &m);
}

}  // namespace fisherfast
#else
namespace fisherfast {
namespace {

bool exists() { return false; }
bool intel() { return false; }

}  // namespace

void multiply(int64_t, int64_t, int64_t, BlasRows, BlasRows, bool, float*) {}

}  // namespace fisherfast
#endif

namespace fisherfast {
namespace {

std::atomic<bool>& current() {
  static std::atomic<bool> chosen{exists() && intel()};
  return chosen;
}

// For tests and benchmarks: whether the BLAS is used where it can be, after saying so where a choice is given.
bool cpu_blas(std::optional<bool> force) {
  if (force) {
    if (*force && !exists()) value_error("cpu_blas: force must be False where torch has no BLAS that can be called, got True");
    current() = *force;
  }
  return uses_blas();
}

}  // namespace

bool uses_blas() { return current().load(std::memory_order_relaxed) && isa() >= Isa::avx512; }

}  // namespace fisherfast

STABLE_TORCH_LIBRARY_FRAGMENT(fisherfast_cpp, m) { m.def("cpu_blas(bool? force=None) -> bool"); }
STABLE_TORCH_LIBRARY_IMPL(fisherfast_cpp, CompositeExplicitAutograd, m) { m.impl("cpu_blas", TORCH_BOX(&fisherfast::cpu_blas)); }
