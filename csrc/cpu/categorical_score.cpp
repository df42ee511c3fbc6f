// SPDX-License-Identifier: Apache-2.0
// out[r] = counted_r (softmax(logits[r]) - e_{y_r}), y given or drawn: a row is read once, into memory of the thread's own that
// stays in its cache, where the exponentials replace the logits; then the result is written once.
#include <algorithm>
#include <cstring>
#include <limits>
#include <type_traits>

#include "cpu/cpu.h"

namespace fisherfast {

template <class S>
struct ScoreProblem {
  Rows<S> logits;
  S* out;                  // [R, C]
  const int64_t* labels;   // [R] or null
  const double* uniform;   // [R], where there are no labels
  const uint8_t* counted;  // [R] or null
  int64_t* drawn;          // [R] or null
};

template <class R>
struct ScoreExp;

// log(2) in two parts, the first short enough that its products with n are exact; kMagic moves an integer to the last bits.
template <>
struct ScoreExp<float> {
  using Bits = uint32_t;
  static constexpr int kDegree = 7, kMantissa = 23;
  static constexpr Bits kOne = Bits{127} << kMantissa;
  static constexpr float kLog2e = 1.44269504f, kMagic = 12582912.0f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  static constexpr float kLowest = -87.33f;
  static constexpr float kTaylor[] = {1.0f, 1.0f, 1.0f / 2, 1.0f / 6, 1.0f / 24, 1.0f / 120, 1.0f / 720, 1.0f / 5040};
};

template <>
struct ScoreExp<double> {
  using Bits = uint64_t;
  static constexpr int kDegree = 13, kMantissa = 52;
  static constexpr Bits kOne = Bits{1023} << kMantissa;
  static constexpr double kLog2e = 1.4426950408889634, kMagic = 6755399441055744.0;
  static constexpr double kLn2High = 6.93145751953125e-1, kLn2Low = 1.42860682030941723212e-6;
  static constexpr double kLowest = -708.39;
  static constexpr double kTaylor[] = {
      1.0,        1.0,         1.0 / 2,      1.0 / 6,       1.0 / 24,       1.0 / 120,       1.0 / 720,
      1.0 / 5040, 1.0 / 40320, 1.0 / 362880, 1.0 / 3628800, 1.0 / 39916800, 1.0 / 479001600, 1.0 / 6227020800.0};
};

// Rounding to nearest, ties to even; written, as widen is, so that loops over it become vector code.
inline void narrow(float& out, float value) { out = value; }
inline void narrow(double& out, double value) { out = value; }

inline void narrow(BFloat16& out, float value) {
  const uint32_t bits = to_bits(value);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  out.x = static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

inline void narrow(Half& out, float value) {
  const uint32_t bits = to_bits(value), twice = bits + bits;
  // Added to a power of two 2^13 times its own last place, the value loses exactly the bits that Half does not hold.
  const uint32_t bias = std::max(twice & 0xff000000u, 0x71000000u);
  const float magnitude = (from_bits(bits & 0x7fffffff) * 0x1p112f) * 0x1p-110f;
  const uint32_t sum = to_bits(from_bits((bias >> 1) + 0x07800000u) + magnitude);
  const uint32_t rounded = ((sum >> 13) & 0x7c00) + (sum & 0x0fff);
  out.x = static_cast<uint16_t>(((bits >> 16) & 0x8000) | (twice > 0xff000000u ? 0x7e00 : rounded));
}

}  // namespace fisherfast

#define FISHERFAST_KERNEL "cpu/categorical_score_kernel.h"
#include "cpu/each_isa.h"

namespace fisherfast {
namespace {

void check_labels(const int64_t* labels, const uint8_t* counted, int64_t R, int64_t C) {
  int64_t low = 0, high = C - 1;
  for (int64_t r = 0; r < R; ++r) {
    if (counted && !counted[r]) continue;
    low = std::min(low, labels[r]);
    high = std::max(high, labels[r]);
  }
  if (low < 0 || high >= C)
    value_error("categorical_score_: labels must lie in [0, C = ", C, "), got ", low < 0 ? low : high,
                "; leave rows without a label out with counted");
}

void categorical_score(Tensor out, Tensor logits, OptionalTensor labels, OptionalTensor uniform, OptionalTensor counted,
                       OptionalTensor drawn) {
  constexpr int64_t kGrain = 8192;  // elements below which a second thread does not pay
  const int64_t R = logits.size(0), C = logits.size(1);
  if (C == 0 && drawn) std::fill_n(data_or_null<int64_t>(drawn), R, -1);
  if (R == 0 || C == 0) return;
  const auto* y = data_or_null<const int64_t>(labels);
  const auto* kept = data_or_null<const uint8_t>(counted);
  if (y) check_labels(y, kept, R, C);
  dispatch_input("categorical_score_", logits.scalar_type(), [&](auto type) {
    using S = typename decltype(type)::type;
    const ScoreProblem<S> problem{
        rows_of<S>(logits),          static_cast<S*>(out.mutable_data_ptr()), y, data_or_null<const double>(uniform), kept,
        data_or_null<int64_t>(drawn)};
    const auto run = FISHERFAST_PICK(score_rows<S>);
    torch::stable::parallel_for(0, R, kGrain / C + 1, [&](int64_t begin, int64_t end) { run(problem, begin, end); });
  });
}

}  // namespace
}  // namespace fisherfast

STABLE_TORCH_LIBRARY_FRAGMENT(fisherfast_cpp, m) {
  m.def(
      "categorical_score_(Tensor(a!) out, Tensor logits, *, Tensor? labels=None, Tensor? uniform=None, Tensor? counted=None, "
      "Tensor(b!)? drawn=None) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(fisherfast_cpp, CPU, m) { m.impl("categorical_score_", TORCH_BOX(&fisherfast::categorical_score)); }
