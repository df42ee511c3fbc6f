// SPDX-License-Identifier: Apache-2.0
// The check behind the flag: one read of the inputs before anything is added.
#include <algorithm>
#include <atomic>
#include <type_traits>
#include <vector>

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

struct Axis {
  int64_t size, stride;
};

// The axes of a tensor's elements, the longest stride first; those that memory allows are one, repeated elements are left out.
std::vector<Axis> axes_of(const Tensor& tensor) {
  std::vector<Axis> axes;
  for (int64_t d = 0; d < tensor.dim(); ++d)
    if (tensor.size(d) > 1 && tensor.stride(d) > 0) axes.push_back({tensor.size(d), tensor.stride(d)});
  std::stable_sort(axes.begin(), axes.end(), [](const Axis& a, const Axis& b) { return a.stride > b.stride; });
  std::vector<Axis> merged;
  for (const Axis& axis : axes) {
    if (!merged.empty() && merged.back().stride == axis.size * axis.stride) {
      merged.back() = {merged.back().size * axis.size, axis.stride};
    } else {
      merged.push_back(axis);
    }
  }
  if (merged.empty()) merged.push_back({1, 1});
  return merged;
}

// Lines along the last axis; a single line is cut where a thread ends.
template <class S>
bool finite(const Tensor& tensor) {
  constexpr int64_t kGrain = 16384;  // elements below which a second thread does not pay
  if (tensor.numel() == 0) return true;
  const auto run = FISHERFAST_PICK(all_finite<Bits<S>>);
  const auto* data = static_cast<const Bits<S>*>(tensor.const_data_ptr());
  std::vector<Axis> axes = axes_of(tensor);
  const Axis line = axes.back();
  axes.pop_back();
  int64_t lines = 1;
  for (const Axis& axis : axes) lines *= axis.size;
  std::atomic<bool> all{true};
  torch::stable::parallel_for(0, lines * line.size, kGrain, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t start = begin % line.size, count = std::min(end - begin, line.size - start);
      int64_t offset = start * line.stride, rest = begin / line.size;
      for (auto axis = axes.rbegin(); axis != axes.rend(); rest /= axis->size, ++axis) offset += rest % axis->size * axis->stride;
      if (!run(data + offset, count, line.stride, kExponent<S>)) all = false;
      begin += count;
    }
  });
  return all;
}

bool finite(const Tensor& tensor) {
  bool all = true;
  dispatch_input("flag", tensor.scalar_type(), [&](auto type) { all = finite<typename decltype(type)::type>(tensor); });
  return all;
}

}  // namespace

bool stopped(const OptionalTensor& flag, const Tensor& g, const OptionalTensor& x, const OptionalTensor& weight) {
  if (!flag) return false;
  auto* value = flag->mutable_data_ptr<int32_t>();
  if (*value == 0 && !(finite(g) && (!x || finite(*x)) && (!weight || finite(*weight)))) *value = 1;
  return *value != 0;
}

}  // namespace fisherfast
