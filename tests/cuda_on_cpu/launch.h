// SPDX-License-Identifier: Apache-2.0
// What the emulated ops share: dtypes by letter, and errors as text.
#pragma once

#include "emulator.h"
#include "cuda/device.cuh"
#include "cuda/plan.h"

namespace fisherfast {

// Bit 0 says that copies happen at once, bit 1 that products do, bit 2 that threads take turns by chance.
inline emulator::Timing timing_of(int32_t timing) { return {(timing & 1) != 0, (timing & 2) != 0, (timing & 4) != 0}; }

// visit(Type<S>{}) for 'f'loat32, 'd' (float64), 'b'float16 and 'h' (float16).
template <typename Visitor>
auto dispatch_letter(char dtype, Visitor&& visit) {
  if (dtype == 'f') return visit(Type<float>{});
  if (dtype == 'd') return visit(Type<double>{});
  if (dtype == 'b') return visit(Type<BFloat16>{});
  return visit(Type<Half>{});
}

// What the op's flag does: it stays down, is up from the start, or another stream raises it while the second block of a cluster begins.
enum Raised : int32_t { kDown, kUp, kMeanwhile };
inline int32_t flag = 0;
inline void raise(int32_t raised, bool meanwhile) {
  if (raised == kMeanwhile && meanwhile) flag = 1;
}

// What `run` returns, or -1 if a kernel did what it must not; then `error` says what.
template <typename Run>
int64_t or_error(char (*error)[256], const Run& run) {
  try {
    return run();
  } catch (const std::exception& wrong) {
    std::strncpy(*error, wrong.what(), sizeof(*error) - 1);
    return -1;
  }
}

}  // namespace fisherfast
