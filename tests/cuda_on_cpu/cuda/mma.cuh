// SPDX-License-Identifier: Apache-2.0
// In the place of csrc/cuda/mma.cuh: the same four instructions, as the PTX ISA's pages on cp.async, ldmatrix and mma.m16n8k16 say,
// for one lane of an emulated warp. What the real ones only punish with time, a bank conflict, is an error here.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "emulator.h"

namespace fisherfast {

using emulator::require;

inline void cp_async_16(void* shared, const void* global, int bytes) {
  require(reinterpret_cast<uintptr_t>(shared) % 16 == 0 && reinterpret_cast<uintptr_t>(global) % 16 == 0, "cp.async: address");
  require(bytes >= 0 && bytes <= 16, "cp.async: size");
  const emulator::Action copy = [=] {
    std::memset(shared, 0, 16);
    if (bytes > 0) std::memcpy(shared, global, bytes);
  };
  if (emulator::cluster->timing.eager_copies) {
    copy();
  } else {
    emulator::self().copies.open.push_back(copy);
  }
}

inline void cp_async_commit() { emulator::self().copies.commit(); }

template <int kPending>
void cp_async_wait() {
  auto& copies = emulator::self().copies;
  copies.complete(copies.but(kPending));
}

// Lane l holds the elements of column l / 4 in rows l % 4 * 2 and l % 4 * 2 + 1 of each matrix.
inline void ldmatrix_x4_trans(uint32_t (&fragment)[4], const void* row) {
  struct Shown {
    alignas(16) const uint16_t* row;
  };
  const auto& shown = emulator::exchange(Shown{static_cast<const uint16_t*>(row)});
  const int lane = threadIdx.x % 32;
  for (int matrix = 0; matrix < 4; ++matrix) {
    unsigned banks = 0;
    for (int r = 0; r < 8; ++r) {
      const auto address = reinterpret_cast<uintptr_t>(shown[matrix * 8 + r].row);
      require(address % 16 == 0, "ldmatrix: address");
      banks |= 1u << address / 16 % 8;
    }
    require(banks == 0xff, "ldmatrix: bank conflict");
    const uint32_t low = shown[matrix * 8 + lane % 4 * 2].row[lane / 4], high = shown[matrix * 8 + lane % 4 * 2 + 1].row[lane / 4];
    fragment[matrix] = low | high << 16;
  }
}

template <typename T>
float element(uint32_t pair, int which) {
  T value;
  value.x = static_cast<uint16_t>(pair >> 16 * which);
  return static_cast<float>(value);
}

// a: registers hold (row l / 4, columns l % 4 * 2 and the next), the rows 8 below, both 8 columns further. b: (rows l % 4 * 2 and
// the next, column l / 4), 8 rows further. c: (row l / 4, columns l % 4 * 2 and the next), the rows 8 below.
template <typename T>
void mma_16816(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct A {
    alignas(16) uint32_t registers[4];
  };
  struct B {
    alignas(16) uint32_t registers[2];
  };
  A all_a[32];
  B all_b[32];
  std::memcpy(all_a, emulator::exchange(A{{a[0], a[1], a[2], a[3]}}), sizeof(all_a));
  std::memcpy(all_b, emulator::exchange(B{{b0, b1}}), sizeof(all_b));
  const int lane = threadIdx.x % 32;
  for (int e = 0; e < 4; ++e) {
    const int row = lane / 4 + e / 2 * 8, column = lane % 4 * 2 + e % 2;
    double sum = c[e];
    for (int k = 0; k < 16; ++k) {
      const uint32_t left = all_a[row % 8 * 4 + k % 8 / 2].registers[row / 8 + k / 8 * 2];
      const uint32_t right = all_b[column * 4 + k % 8 / 2].registers[k / 8];
      sum += static_cast<double>(element<T>(left, k % 2)) * element<T>(right, k % 2);
    }
    c[e] = static_cast<float>(sum);
  }
}

}  // namespace fisherfast
