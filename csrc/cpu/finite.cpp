// SPDX-License-Identifier: Apache-2.0
// The check behind the flag: one read of the inputs before anything is added.
#include <atomic>
#include <type_traits>

#include "cpu/lines.h"

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
bool finite(const Tensor& tensor) {
  constexpr int64_t kGrain = 16384;  // elements below which a second thread does not pay
  if (tensor.numel() == 0) return true;
  const auto run = FISHERFAST_PICK(all_finite<Bits<S>>);
  const auto* data = static_cast<const Bits<S>*>(tensor.const_data_ptr());
  const Lines lines(tensor, Repeated::once);
  std::atomic<bool> all{true};
  torch::stable::parallel_for(0, lines.size(), kGrain, [&](int64_t begin, int64_t end) {
    lines.visit(begin, end, [&](int64_t offset, int64_t count, int64_t stride) {
      if (!run(data + offset, count, stride, kExponent<S>)) all = false;
    });
  });
  return all;
}

bool finite(const Tensor& tensor) {
  bool all = true;
  dispatch_input("flag", tensor.scalar_type(), [&](auto type) { all = finite<typename decltype(type)::type>(tensor); });
  return all;
}

}  // namespace

bool raised(const OptionalTensor& flag) { return flag && *flag->const_data_ptr<int32_t>() != 0; }

bool stopped(const OptionalTensor& flag, const Tensor& g, const OptionalTensor& x, const OptionalTensor& weight) {
  if (!flag) return false;
  if (!raised(flag) && !(finite(g) && (!x || finite(*x)) && (!weight || finite(*weight)))) *flag->mutable_data_ptr<int32_t>() = 1;
  return raised(flag);
}

}  // namespace fisherfast
