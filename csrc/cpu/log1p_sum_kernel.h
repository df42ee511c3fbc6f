// SPDX-License-Identifier: Apache-2.0
// Compiled once per instruction set by each_isa.h.
#include "cpu/lanes.h"

// With 1 + s = 2^k (1 + v), sqrt(1/2) <= 1 + v < sqrt(2), and z = v / (2 + v), so that log(1 + v) = 2 atanh(z):
//   log(1 + s)             = k log 2 + 2z + t,                     t = 2 (z^3/3 + z^5/5 + ...)
//   log(1 + s) - s/(1 + s) = k log 2 + z v r + t - r (1 - 2^-k),   r = 1 / (1 + v)
// Below s = sqrt(2) - 1, k is 0 and v is s itself: all terms are exact to rounding and the second form subtracts nothing, so
// that small s keep all their digits; above, 13 is the most that the difference loses. One division gives z and r.
// Whatever is not finite becomes NaN on its own, as does 1 + s above 2^1022.5, where 2^-k ends; its sign is watched.
inline Log1pSums log1p_sums(double factor, const double* values, int64_t count) {
  using Vector = Lanes<double>::Vector;
  typedef uint64_t Bits __attribute__((vector_size(kVectorBytes)));
  constexpr uint64_t kOne = uint64_t{1023} << 52, kExponent = uint64_t{0xfff} << 52, kSqrtHalf = 0x3fe6a09e667f3bcd;
  constexpr int kTerms = 9;  // the next one is 2e-17 of the sum
  Vector logs{}, costs{};
  Bits exponents{}, signs{};
  for (int64_t j = 0; j < count; j += Lanes<double>::count) {
    const Vector s = factor * *reinterpret_cast<const Lanes<double>::Unaligned*>(values + j);
    const Bits sum = reinterpret_cast<Bits>(1.0 + s);
    const Bits rounded = sum + (kOne - kSqrtHalf);
    const Vector power = reinterpret_cast<Vector>(2 * kOne - (rounded & kExponent));  // 2^-k
    const Vector v = s * power + (power - 1.0);
    const Vector w = 1.0 / ((1.0 + v) * (2.0 + v));
    const Vector z = v * (1.0 + v) * w, r = (2.0 + v) * w, square = z * z;
    Vector series = Vector{} + 2.0 / (2 * kTerms + 1);
#pragma GCC unroll 16
    for (int n = kTerms - 1; n >= 1; --n) series = series * square + 2.0 / (2 * n + 1);
    const Vector tail = z * square * series;
    logs += 2.0 * z + tail;
    costs += (z * v * r + tail) - r * (1.0 - power);
    exponents += rounded >> 52;
    signs |= sum - 1;  // negative, or zero
  }
  double log = 0, cost = 0;
  int64_t exponent = -1023 * count;
  uint64_t sign = 0;
  for (int i = 0; i < Lanes<double>::count; ++i) {
    log += logs[i];
    cost += costs[i];
    exponent += static_cast<int64_t>(exponents[i]);
    sign |= signs[i];
  }
  constexpr double kLog2 = 0.693147180559945309;
  const double whole = sign >> 63 ? std::numeric_limits<double>::quiet_NaN() : kLog2 * static_cast<double>(exponent);
  return {whole + log, whole + cost};
}
