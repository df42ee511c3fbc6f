// SPDX-License-Identifier: Apache-2.0
// What the kernels share on the device.
#pragma once

#include "common.h"

namespace fisherfast {

// A float32 or float64 tensor that is added to, or none.
struct Output {
  void* data;
  bool is_double;

  __device__ double at(int64_t index) const {
    return is_double ? static_cast<const double*>(data)[index] : static_cast<const float*>(data)[index];
  }
  __device__ void put(int64_t index, double value) const {
    if (is_double) {
      static_cast<double*>(data)[index] = value;
    } else {
      static_cast<float*>(data)[index] = static_cast<float>(value);
    }
  }
  __device__ void add(int64_t index, double value) const { put(index, at(index) + value); }
};

// Whether what the op's flag is about has happened.
inline __device__ bool is_up(const int32_t* flag) { return flag && *flag; }

// A factor in either precision: where the kernel rounds it, the compiler has every element round it again.
struct Factor {
  double exact;
  float rounded;

  Factor() = default;
  FISHERFAST_HD constexpr Factor(double factor) : exact(factor), rounded(static_cast<float>(factor)) {}
};

// A place for kWidth elements, read and written at once.
template <typename Out, int kWidth>
struct alignas(kWidth * sizeof(Out)) Neighbours {
  Out values[kWidth];
};

// out[row * stride + column] += scale * value for a thread's kOwned elements, which each(visit) hands to visit(row, column,
// value), in the same order every time; those that are not inside(row, column) are left alone. Every kWidth of them are
// neighbours, at a multiple of their size. Without `held` nothing was there yet. Loads run ahead of the additions, up to kAhead
// registers of them: by itself, each would wait for memory.
template <int kOwned, int kAhead, int kWidth, typename Out, typename Real, typename Inside, typename Each>
__device__ void add_owned(Out* out, int64_t stride, Real scale, bool held, const Inside& inside, const Each& each) {
  constexpr int kLoads = kAhead * sizeof(float) / sizeof(Out);
  static_assert(kLoads % kWidth == 0 && kOwned % kWidth == 0, "neighbours are together");
  using Place = Neighbours<Out, kWidth>;
#pragma unroll
  for (int first = 0; first < kOwned; first += kLoads) {
    Place places[kLoads / kWidth] = {};
    int k = 0;
    const auto ahead = [&] { return first <= k && k < first + kLoads; };
    if (held) {
      each([&](int row, int column, auto) {
        if (ahead() && k % kWidth == 0 && inside(row, column))
          places[(k - first) / kWidth] = *reinterpret_cast<const Place*>(out + row * stride + column);
        ++k;
      });
    }
    k = 0;
    each([&](int row, int column, auto value) {
      if (ahead() && inside(row, column)) {
        Place& place = places[(k - first) / kWidth];
        place.values[k % kWidth] = static_cast<Out>(place.values[k % kWidth] + scale * value);
        if (k % kWidth == kWidth - 1) *reinterpret_cast<Place*>(out + row * stride + column - k % kWidth) = place;
      }
      ++k;
    });
  }
}

// The same number, of which the compiler knows nothing: addresses that depend on it are not computed before a loop that has no
// registers for them.
inline __device__ int opaque(int number) {
  asm volatile("" : "+r"(number));
  return number;
}

// Where a block's sums of a tile go: to an output, or to its share of a workspace, of whose shares add_partials makes one sum.
template <typename Real>
struct Target {
  Output output;
  Factor scale;  // of what is added to the output
  int64_t columns;
  Real* share;          // or null
  const int32_t* flag;  // while it is up nothing is added to the output; or null

  // Rows of a share begin at even places, so that neighbours lie together.
  static FISHERFAST_HD int64_t pitch(int64_t columns) { return columns + columns % 2; }

  // Adds what each(visit) hands to visit(row, column, value): all of the tile, if it is `whole`, or what is inside(row, column).
  // Nobody fills a share with zeros: it is written first, and added to where it is `held`.
  template <int kOwned, int kAhead, typename Inside, typename Each>
  __device__ void add(bool held, bool whole, const Inside& inside, const Each& each) const {
    constexpr bool kDouble = std::is_same_v<Real, double>;
    using Other = std::conditional_t<kDouble, float, double>;
    if (!share && is_up(flag)) return;
    if (!share && output.is_double != kDouble) {
      return add_owned<kOwned, kAhead, 1>(static_cast<Other*>(output.data), columns, scale.exact, true, inside, each);
    }
    Real* const out = share ? share : static_cast<Real*>(output.data);
    const int64_t stride = share ? pitch(columns) : columns;
    const Real factor = share ? Real(1) : kDouble ? static_cast<Real>(scale.exact) : scale.rounded;
    if constexpr (kOwned % 2 == 0) {
      const bool together = stride % 2 == 0 && reinterpret_cast<uintptr_t>(out) % (2 * sizeof(Real)) == 0;
      if (whole && together) {
        const auto always = [](int, int) { return true; };
        return add_owned<kOwned, kAhead, 2>(out, stride, factor, !share || held, always, each);
      }
    }
    add_owned<kOwned, kAhead, 1>(out, stride, factor, !share || held, inside, each);
  }
};

// For loads ahead: where sums of several kinds fill the others, or those of a product that has been added up are free.
constexpr int kFewRegisters = 32, kManyRegisters = 64;

constexpr int kVector = 8;  // 16-bit elements of 16 bytes

// Whether the rows of N samples of T can be copied 16 bytes at a time.
template <typename In>
bool in_vectors(const Rows<In>& rows, int64_t N, int64_t T) {
  return rows.width > 0 && rows.stride_d == 1 && (T <= 1 || rows.stride_t % kVector == 0) &&
         (N <= 1 || rows.stride_n % kVector == 0) && reinterpret_cast<uintptr_t>(rows.data) % 16 == 0;
}

// The sum over the lanes of a warp, in lane 0; always in the same order.
template <typename Real>
__device__ Real warp_sum(Real value) {
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_down_sync(0xffffffffu, value, distance);
  return value;
}

}  // namespace fisherfast
