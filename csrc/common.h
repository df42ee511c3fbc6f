// SPDX-License-Identifier: Apache-2.0
// What every native op needs from torch, and the only place that says how rows and samples lie in memory.
// The Python check (fisherfast/ops) has already validated shapes, dtypes, devices and the contiguity of outputs.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <type_traits>

// The tail of every op's schema; fisherfast/ops/_common.py holds the same string, and a test compares the two.
#define FISHERFAST_OUTPUTS                                          \
  "float scale=1.0, *, Tensor? weight=None, Tensor? offsets=None, " \
  "Tensor(b!)? total=None, Tensor(c!)? sqnorm=None, Tensor(d!)? flag=None"

#ifdef __CUDACC__
#define FISHERFAST_HD __host__ __device__
#else
#define FISHERFAST_HD
#endif

namespace fisherfast {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Products and squares are never formed in 16 bits.
template <class S>
using compute_t = std::conditional_t<std::is_same_v<S, double>, double, float>;

template <class T>
T* data_or_null(const OptionalTensor& tensor) {
  return tensor ? static_cast<T*>(tensor->mutable_data_ptr()) : nullptr;
}

// How rows are grouped into samples: [N, T, ...], or packed rows with offsets (on the tensors' device).
struct Samples {
  int64_t N;
  int64_t T;  // rows of every sample; meaningless with offsets
  int64_t M;  // rows of all samples
  const int64_t* offsets;

  FISHERFAST_HD int64_t begin(int64_t n) const { return offsets ? offsets[n] : n * T; }
  FISHERFAST_HD int64_t rows(int64_t n) const { return offsets ? offsets[n + 1] - offsets[n] : T; }
};

inline Samples samples_of(const Tensor& g, const OptionalTensor& offsets) {
  if (offsets) return {offsets->size(0) - 1, 0, g.size(0), offsets->const_data_ptr<int64_t>()};
  return {g.size(0), g.size(1), g.size(0) * g.size(1), nullptr};
}

// One input, [N, T, width] or [M, width], any strides (in elements).
template <class S>
struct Rows {
  const S* data;
  int64_t stride_n, stride_t, stride_d, width;

  FISHERFAST_HD const S* sample(const Samples& samples, int64_t n) const {
    return data + (samples.offsets ? samples.offsets[n] * stride_t : n * stride_n);
  }

  // Is the step from row to row the same everywhere, also from one sample to the next?
  FISHERFAST_HD bool even(const Samples& samples) const {
    return samples.offsets || samples.N <= 1 || stride_n == samples.T * stride_t;
  }
};

template <class S>
Rows<S> rows_of(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  const int64_t stride_n = last == 2 ? tensor.stride(0) : 0;
  const auto* data = static_cast<const S*>(tensor.const_data_ptr());
  return {data, stride_n, tensor.stride(last - 1), tensor.stride(last), tensor.size(last)};
}

// Rows that nobody groups, [M, width] or [N, T, width].
inline Samples samples_of_rows(const Tensor& x) {
  return x.dim() == 3 ? samples_of(x, {}) : Samples{1, x.size(0), x.size(0), nullptr};
}

// Makes one sample of all of them, where memory allows.
template <class S>
void join_samples(Rows<S>& x, Samples& samples) {
  if (samples.T == 1) x.stride_t = x.stride_n;
  if (x.even(samples)) samples = {1, samples.M, samples.M, nullptr};
}

template <class T>
struct Type {
  using type = T;
};

// visit(Type<S>{}) with the C++ type of an input.
template <class Visitor>
void dispatch_input(const char* op, ScalarType dtype, Visitor&& visit) {
  if (dtype == ScalarType::Float) return visit(Type<float>{});
  if (dtype == ScalarType::BFloat16) return visit(Type<BFloat16>{});
  if (dtype == ScalarType::Half) return visit(Type<Half>{});
  if (dtype == ScalarType::Double) return visit(Type<double>{});
  STD_TORCH_CHECK(false, op, ": no kernel for inputs of dtype ", torch::headeronly::toString(dtype));
}

// visit(Type<A>{}) with the C++ type of an accumulator (acc, total, sqnorm).
template <class Visitor>
void dispatch_accumulator(const char* op, ScalarType dtype, Visitor&& visit) {
  if (dtype == ScalarType::Float) return visit(Type<float>{});
  if (dtype == ScalarType::Double) return visit(Type<double>{});
  STD_TORCH_CHECK(false, op, ": no kernel for accumulators of dtype ", torch::headeronly::toString(dtype));
}

// Python sees a ValueError, as from the reference.
template <class... Parts>
[[noreturn]] void value_error(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

}  // namespace fisherfast
