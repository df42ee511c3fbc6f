// SPDX-License-Identifier: Apache-2.0
// The kernels of csrc/cuda/embedding_sq.cuh, kron_log1p_sum.cuh and small.cuh, for tests/test_cuda_others.py.
#include <cmath>

#include "launch.h"

using std::isfinite;
inline int64_t __double_as_longlong(double value) {
  int64_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}
inline double __longlong_as_double(int64_t bits) {
  double value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

#include "cuda/embedding_sq.cuh"
#include "cuda/kron_log1p_sum.cuh"
#include "cuda/small.cuh"

namespace fisherfast {
namespace {

constexpr emulator::Timing kNothingAsynchronous{};

Index grid_of(int64_t x, int64_t y = 1) { return {static_cast<unsigned>(x), static_cast<unsigned>(y), 1}; }

struct EmbeddingCall {
  int64_t N, T, M, V, D, ids_strides[2], g_strides[3], padding_idx;
  double scale;
  int32_t acc_is_double;
};
struct EmbeddingArrays {
  void *acc, *total;
  const int64_t* ids;
  const void* g;
  const float* weight;
  const int64_t* offsets;
  int64_t *keys, *order;  // [M]: unsorted keys are written; sorted ones are read
  double* norms;          // [M, tiles] zeros, or null
};

}  // namespace
}  // namespace fisherfast

using namespace fisherfast;

extern "C" {

// Few blocks, so that each takes several rows.
int64_t embedding_keys(const EmbeddingCall* call, const EmbeddingArrays* a, char (*error)[256]) {
  return or_error(error, [&] {
    const runs::KeyParams params{{call->N, call->T, call->M, a->offsets}, a->ids,  call->ids_strides[0], call->ids_strides[1],
                                 call->V,                                 call->padding_idx, a->keys};
    emulator::run_grid(grid_of(2), runs::kThreads, 1, kNothingAsynchronous, [&] { runs::keys_kernel(params); });
    return int64_t{0};
  });
}

// The number of tiles, of which each row has a partial sum of its norm.
int64_t embedding_runs(char dtype, const EmbeddingCall* call, const EmbeddingArrays* a, char (*error)[256]) {
  return or_error(error, [&] {
    return dispatch_letter(dtype, [&](auto type) {
      using In = typename decltype(type)::type;
      const bool is_double = call->acc_is_double != 0;
      const Rows<In> g{static_cast<const In*>(a->g), call->g_strides[0], call->g_strides[1], call->g_strides[2], call->D};
      const runs::RunParams<In> params{{call->N, call->T, call->M, a->offsets}, g,       a->keys, a->order,
                                       call->V, a->weight, nullptr, call->scale, {a->acc, is_double}, {a->total, is_double}, a->norms};
      const int64_t groups = ceil_div(call->D, runs::kTile * runs::kWarps);
      emulator::run_grid(grid_of(call->M, groups), runs::kThreads, 1, kNothingAsynchronous, [&] { runs::runs_kernel<In>(params); });
      return groups * runs::kWarps;
    });
  });
}

// Adds to sums[2] what the blocks of `share` rows each have left.
int64_t kron(char dtype_a, char dtype_b, const void* a, const void* b, const int64_t* extents, const int64_t* strides, int64_t share,
             double c, double* partial, double* sums, char (*error)[256]) {
  return or_error(error, [&] {
    const int64_t across = ceil_div(extents[1], kron::kColumns), shares = ceil_div(extents[0], share), blocks = across * shares;
    const auto run = [&](auto type_a, auto type_b) {
      using A = typename decltype(type_a)::type;
      using B = typename decltype(type_b)::type;
      const kron::KronParams<A, B> params{static_cast<const A*>(a), static_cast<const B*>(b), extents[0], extents[1], strides[0],
                                          strides[1], share, c, partial};
      emulator::run_grid(grid_of(across, shares), kron::kThreads, 1, kNothingAsynchronous, [&] { kron::kron_sums_kernel<A, B>(params); });
    };
    const auto with_a = [&](auto type_a) { dtype_b == 'f' ? run(type_a, Type<float>{}) : run(type_a, Type<double>{}); };
    dtype_a == 'f' ? with_a(Type<float>{}) : with_a(Type<double>{});
    const NormPartials norms{partial, nullptr, blocks, 2, {sums, true}, nullptr};
    emulator::run_grid(grid_of(2), small::kThreads, 1, kNothingAsynchronous, [&] { small::add_norms_kernel(norms); });
    return blocks;
  });
}

// The number of rows that it is read in.
int64_t raise_flag(char dtype, const void* data, int64_t axes, const int64_t* sizes, const int64_t* strides, int32_t* flag,
                   char (*error)[256]) {
  return or_error(error, [&] {
    return dispatch_letter(dtype, [&](auto type) {
      using In = typename decltype(type)::type;
      const auto params = small::flag_params(static_cast<const In*>(data), axes, sizes, strides, flag);
      emulator::run_grid(grid_of(2, 2), small::kThreads, 1, kNothingAsynchronous, [&] { small::raise_flag_kernel<In>(params); });
      return params.sizes[0] * params.sizes[1];
    });
  });
}

int64_t check_offsets(const int64_t* offsets, int64_t N, int64_t M, char (*error)[256]) {
  return or_error(error, [&] {
    const Samples samples{N, 0, M, offsets};
    emulator::run_grid(grid_of(2), small::kThreads, 1, kNothingAsynchronous, [&] { small::check_offsets_kernel(samples); });
    return int64_t{0};
  });
}

// Partial sums lie in rows of an even length. With few blocks each takes several rows.
int64_t add_partials(const float* data, int64_t rows, int64_t columns, int64_t splits, int64_t down, int32_t upper, double scale,
                     float* out, const int32_t* flag, char (*error)[256]) {
  return or_error(error, [&] {
    const int64_t pitch = Target<float>::pitch(columns);
    const Partials<float> params{data, rows * pitch, rows, columns, pitch, splits, scale, {out, false}, flag, upper != 0};
    const Index grid = grid_of(ceil_div(columns, small::kThreads / params.groups()), down);
    emulator::run_grid(grid, small::kThreads, 1, kNothingAsynchronous, [&] { small::add_partials_kernel<float>(params); });
    return int64_t{0};
  });
}

int64_t add_norms(const double* data, const int64_t* offsets, int64_t width, int64_t N, float* out, const int32_t* flag,
                  char (*error)[256]) {
  return or_error(error, [&] {
    const NormPartials params{data, offsets, width, N, {out, false}, flag};
    emulator::run_grid(grid_of(N), small::kThreads, 1, kNothingAsynchronous, [&] { small::add_norms_kernel(params); });
    return int64_t{0};
  });
}

}
