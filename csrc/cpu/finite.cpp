// SPDX-License-Identifier: Apache-2.0
// The check behind the flag: one read of the inputs before anything is added.
#include <atomic>
#include <type_traits>

#include "cpu/cpu.h"

#define FISHERFAST_KERNEL "cpu/finite_kernel.h"
#include "cpu/each_isa.h"

namespace fisherfast {
namespace {

template <class S>
using Bits = std::conditional_t<sizeof(S) == 8, uint64_t, std::conditional_t<sizeof(S) == 4, uint32_t, uint16_t>>;

template <class S>
constexpr Bits<S> kExponent = std::is_same_v<S, double>     ? static_cast<Bits<S>>(0x7ff0000000000000)
                              : std::is_same_v<S, float>    ? static_cast<Bits<S>>(0x7f800000)
                              : std::is_same_v<S, BFloat16> ? static_cast<Bits<S>>(0x7f80)
                                                            : static_cast<Bits<S>>(0x7c00);

template <class S>
bool finite(const Rows<S>& rows, const Samples& samples) {
  constexpr int64_t kGrain = 16384;  // elements below which a second thread does not pay
  const auto run = FISHERFAST_PICK(all_finite<Bits<S>>);
  const auto clean = [&](const S* data, int64_t count, int64_t stride) {
    return run(reinterpret_cast<const Bits<S>*>(data), count, stride, kExponent<S>);
  };
  std::atomic<bool> all{true};
  const bool dense = rows.stride_d == 1 && rows.stride_t == rows.width && rows.even(samples);
  if (dense) {
    torch::stable::parallel_for(0, samples.M * rows.width, kGrain, [&](int64_t begin, int64_t end) {
      if (!clean(rows.data + begin, end - begin, 1)) all = false;
    });
  } else {
    torch::stable::parallel_for(0, samples.M, kGrain / (rows.width + 1) + 1, [&](int64_t begin, int64_t end) {
      for (int64_t m = begin; m < end; ++m) {
        const int64_t n = samples.offsets ? 0 : m / samples.T;
        if (!clean(rows.data + n * rows.stride_n + (m - n * samples.T) * rows.stride_t, rows.width, rows.stride_d)) all = false;
      }
    });
  }
  return all;
}

bool finite(const Tensor& tensor, const Samples& samples) {
  bool all = true;
  dispatch_input("flag", tensor.scalar_type(), [&](auto type) { all = finite(rows_of<typename decltype(type)::type>(tensor), samples); });
  return all;
}

bool finite_weight(const Tensor& weight) {
  return finite(Rows<float>{weight.const_data_ptr<float>(), 0, 0, 1, weight.size(0)}, Samples{1, 1, 1, nullptr});
}

}  // namespace

bool stopped(const OptionalTensor& flag, const Samples& samples, const Tensor& g, const OptionalTensor& x, const OptionalTensor& weight) {
  if (!flag) return false;
  auto* value = flag->mutable_data_ptr<int32_t>();
  if (*value == 0 && !(finite(g, samples) && (!x || finite(*x, samples)) && (!weight || finite_weight(*weight)))) *value = 1;
  return *value != 0;
}

}  // namespace fisherfast
