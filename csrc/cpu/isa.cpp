// SPDX-License-Identifier: Apache-2.0
#include "cpu/isa.h"

#include <atomic>
#include <string>

#include "common.h"

namespace fisherfast {
namespace {

constexpr const char* kNames[] = {"portable", "avx2", "avx512"};

// The sets tested are those each_isa.h compiles for.
Isa best() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  return avx2 && avx512 ? Isa::avx512 : avx2 ? Isa::avx2 : Isa::portable;
#else
  return Isa::portable;
#endif
}

std::atomic<Isa>& current() {
  static std::atomic<Isa> chosen{best()};
  return chosen;
}

// For tests and benchmarks: the instruction set in use, after setting it where a name is given.
std::string cpu_isa(std::optional<std::string> force) {
  if (force) {
    int wanted = 0;
    while (wanted < 3 && *force != kNames[wanted]) ++wanted;
    if (wanted > static_cast<int>(best()))
      value_error("cpu_isa: force must be an instruction set of this processor, at most ", kNames[static_cast<int>(best())],
                  ", got ", *force);
    current() = static_cast<Isa>(wanted);
  }
  return kNames[static_cast<int>(isa())];
}

}  // namespace

Isa isa() { return current().load(std::memory_order_relaxed); }

}  // namespace fisherfast

STABLE_TORCH_LIBRARY_FRAGMENT(fisherfast_cpp, m) { m.def("cpu_isa(str? force=None) -> str"); }
STABLE_TORCH_LIBRARY_IMPL(fisherfast_cpp, CompositeExplicitAutograd, m) { m.impl("cpu_isa", TORCH_BOX(&fisherfast::cpu_isa)); }
