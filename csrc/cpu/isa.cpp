// SPDX-License-Identifier: Apache-2.0
#include "cpu/isa.h"

#include <atomic>
#include <iterator>
#include <string>

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "common.h"

namespace fisherfast {
namespace {

constexpr const char* kNames[] = {"portable", "avx2", "avx512", "amx"};

#if defined(FISHERFAST_EMULATED_AMX)
bool may_use_amx() { return true; }
#elif defined(FISHERFAST_HAS_AMX) && defined(__linux__)
// Linux keeps matrix registers from a process until it has asked for them.
bool may_use_amx() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#else
bool may_use_amx() { return false; }
#endif

// The sets tested are those each_isa.h compiles for.
Isa best() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (avx2 && avx512) return may_use_amx() ? Isa::amx : Isa::avx512;
  return avx2 ? Isa::avx2 : Isa::portable;
#else
  return Isa::portable;
#endif
}

Isa most() {
  static const Isa found = best();
  return found;
}

std::atomic<Isa>& current() {
  static std::atomic<Isa> chosen{most()};
  return chosen;
}

// For tests and benchmarks: the instruction set in use, after setting it where a name is given.
std::string cpu_isa(std::optional<std::string> force) {
  if (force) {
    int wanted = 0;
    while (wanted < static_cast<int>(std::size(kNames)) && *force != kNames[wanted]) ++wanted;
    if (wanted > static_cast<int>(most()))
      value_error("cpu_isa: force must be an instruction set of this processor, at most ", kNames[static_cast<int>(most())],
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
