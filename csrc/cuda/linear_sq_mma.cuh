// SPDX-License-Identifier: Apache-2.0
// linear_sq for 16-bit inputs, by tensor cores: mma.sync with float sums, fed by an asynchronous copy pipeline.
#pragma once

#include "linear_sq.cuh"
#include "cuda/mma.cuh"

namespace fisherfast {

// Registers of a thread without total: 64 for c, 64 for the squares, 24 for fragments of g and x, about 40 for addresses:
// one block of 8 warps per multiprocessor (255 registers are allowed). With total the tile is halved: 32 + 32 + 32.
template <typename In_, bool kTotal_>
struct MmaTraits {
  using In = In_;
  static constexpr bool kTotal = kTotal_;
  static constexpr int kTileO = kTotal ? 64 : 128, kTileI = 128, kRows = 32, kStages = 4;
  static constexpr int kWarpsO = 2, kWarpsI = 4, kThreads = 32 * kWarpsO * kWarpsI;
  static constexpr int kMmaO = kTileO / kWarpsO / 16, kMmaI = kTileI / kWarpsI / 8;  // products of a warp, 16 x 8 each
  static constexpr int kStage = kRows * (kTileO + kTileI);                           // elements
  static constexpr int kSharedBytes = kStages * kStage * 2;
  static_assert(sizeof(In) == 2, "the fragments hold 16-bit elements");
  static_assert(kTileO >= 64 && kTileI >= 64, "the swizzle permutes the 8 vectors of 64 features");
  static_assert(kMmaI % 2 == 0, "fragments of x are loaded two at a time");
  static_assert(kRows % 16 == 0 && kRows * kTileO / 8 % kThreads == 0 && kRows * kTileI / 8 % kThreads == 0, "whole loads");
  // visit(o, i, e) for what a thread owns: element e of product (o, i), at row o * 16 + e / 2 * 8, column i * 8 + e % 2.
  template <typename Visit>
  static __device__ void for_each_owned(Visit visit) {
#pragma unroll
    for (int o = 0; o < kMmaO; ++o)
#pragma unroll
      for (int i = 0; i < kMmaI; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e) visit(o, i, e);
  }
  static_assert(kSharedBytes <= 99 * 1024, "sm_86 and sm_89 give a block 99 KB");
};

constexpr int kVector = 8;  // elements of 16 bytes

// Rows of kTile features lie in shared memory in vectors of 16 bytes, permuted within each row so that the same vector of 8
// consecutive rows, which one matrix load reads, lies in 8 different groups of banks.
template <int kTile>
__device__ int swizzled(int row, int vector) {
  return row * kTile + (vector ^ (row % 8)) * kVector;
}

// Copies features [feature, feature + kTile) of `count` rows from `first` on, and zeros in the place of what is not there.
template <typename Traits, int kTile>
__device__ void load_tile(uint16_t* shared, const Rows<typename Traits::In>& rows, bool aligned, const uint16_t* first,
                          int count, int feature) {
  for (int v = threadIdx.x; v < Traits::kRows * kTile / kVector; v += Traits::kThreads) {
    const int row = v / (kTile / kVector), vector = v % (kTile / kVector);
    const int f = feature + vector * kVector;
    const int valid = row < count ? max(0, min(kVector, static_cast<int>(rows.width) - f)) : 0;
    const uint16_t* source = valid ? first + row * rows.stride_t + f * rows.stride_d : first;
    uint16_t* target = shared + swizzled<kTile>(row, vector);
    if (aligned) {
      cp_async_16(target, source, valid * 2);
    } else {
      uint32_t pairs[kVector / 2];
      for (int e = 0; e < kVector; e += 2) {
        const uint32_t low = e < valid ? source[e * rows.stride_d] : 0;
        const uint32_t high = e + 1 < valid ? source[(e + 1) * rows.stride_d] : 0;
        pairs[e / 2] = low | high << 16;
      }
      *reinterpret_cast<uint4*>(target) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
    }
  }
}

// c += g^T x over the rows of one stage.
template <typename Traits>
__device__ void multiply_stage(float (&c)[Traits::kMmaO][Traits::kMmaI][4], const uint16_t* g, const uint16_t* x, int rows) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row = lane % 8, matrix = lane / 8;
  const int o_vector = warp / Traits::kWarpsI * Traits::kMmaO * 2 + matrix % 2;
  const int i_vector = warp % Traits::kWarpsI * Traits::kMmaI + matrix / 2;
#pragma unroll
  for (int t = 0; t < Traits::kRows; t += 16) {
    if (t >= rows) return;
    uint32_t a[Traits::kMmaO][4], b[Traits::kMmaI / 2][4];
#pragma unroll
    for (int o = 0; o < Traits::kMmaO; ++o)
      ldmatrix_x4_trans(a[o], g + swizzled<Traits::kTileO>(t + row + matrix / 2 * 8, o_vector + o * 2));
#pragma unroll
    for (int i = 0; i < Traits::kMmaI / 2; ++i)
      ldmatrix_x4_trans(b[i], x + swizzled<Traits::kTileI>(t + row + matrix % 2 * 8, i_vector + i * 2));
#pragma unroll
    for (int o = 0; o < Traits::kMmaO; ++o)
#pragma unroll
      for (int i = 0; i < Traits::kMmaI; ++i)
        mma_16816<typename Traits::In>(c[o][i], a[o], b[i / 2][i % 2 * 2], b[i / 2][i % 2 * 2 + 1]);
  }
}

template <typename In>
struct LinearSqMmaParams {
  LinearSqParams<In> op;
  bool x_aligned, g_aligned;  // 16-byte copies possible
};

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    linear_sq_mma_kernel(const __grid_constant__ LinearSqMmaParams<typename Traits::In> params) {
  extern __shared__ __align__(16) uint16_t stages[];
  constexpr int kMmaO = Traits::kMmaO, kMmaI = Traits::kMmaI;
  const auto& p = params.op;
  if (p.flag && *p.flag) return;
  const int tile_o = blockIdx.y * Traits::kTileO, tile_i = blockIdx.x * Traits::kTileI;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int o0 = tile_o + warp / Traits::kWarpsI * kMmaO * 16 + lane / 4;
  const int i0 = tile_i + warp % Traits::kWarpsI * kMmaI * 8 + lane % 4 * 2;

  Walk<Traits::kRows> load(p.samples, p.samples_per_split), use(load);
  const uint16_t *x = nullptr, *g = nullptr;
  auto load_stage = [&](int stage) {
    if (load.valid()) {
      if (load.t == 0) {
        x = reinterpret_cast<const uint16_t*>(p.x.sample(p.samples, load.n));
        g = reinterpret_cast<const uint16_t*>(p.g.sample(p.samples, load.n));
      }
      uint16_t* target = stages + stage * Traits::kStage;
      load_tile<Traits, Traits::kTileO>(target, p.g, params.g_aligned, g + load.t * p.g.stride_t, load.rows(), tile_o);
      target += Traits::kRows * Traits::kTileO;
      load_tile<Traits, Traits::kTileI>(target, p.x, params.x_aligned, x + load.t * p.x.stride_t, load.rows(), tile_i);
      load.next(p.samples);
    }
    cp_async_commit();
  };
  for (int stage = 0; stage < Traits::kStages - 1; ++stage) load_stage(stage);

  float c[kMmaO][kMmaI][4] = {}, squares[kMmaO][kMmaI][4] = {}, totals[kMmaO][kMmaI][4] = {};
  for (int stage = 0, samples = 0; use.valid(); stage = (stage + 1) % Traits::kStages) {
    cp_async_wait<Traits::kStages - 2>();
    __syncthreads();  // this stage has arrived for all, and nobody reads the one filled next any more
    load_stage((stage + Traits::kStages - 1) % Traits::kStages);
    const uint16_t* tile = stages + stage * Traits::kStage;
    multiply_stage<Traits>(c, tile, tile + Traits::kRows * Traits::kTileO, use.rows());

    const int n = use.n;
    const bool ends_sample = use.ends_sample();
    use.next(p.samples);
    if (!ends_sample) continue;
    const float w = p.weight ? p.weight[n] : 1.0f;
    float norm = 0;
    Traits::for_each_owned([&](int o, int i, int e) {
      const float value = c[o][i][e], square = value * value;
      squares[o][i][e] += w * square;
      if (Traits::kTotal) totals[o][i][e] += w * value;
      norm += square;
      c[o][i][e] = 0;
    });
    if (p.norms) emit_norm<Traits::kThreads>(p, n, norm);
    if (++samples % kSamplesPerFlush != 0 && use.valid()) continue;
    Traits::for_each_owned([&](int o, int i, int e) {
      emit<Traits::kTotal>(p, o0 + o * 16 + e / 2 * 8, i0 + i * 8 + e % 2, squares[o][i][e], totals[o][i][e]);
      squares[o][i][e] = totals[o][i][e] = 0;
    });
  }
}

template <typename In, bool kTotal>
void launch_tiles(const Device& device, dim3 grid, const LinearSqParams<In>& p, MmaTraits<In, kTotal>) {
  using Traits = MmaTraits<In, kTotal>;
  const auto aligned = [](const Rows<In>& rows) {
    return rows.stride_d == 1 && rows.stride_t % kVector == 0 && rows.stride_n % kVector == 0 &&
           reinterpret_cast<uintptr_t>(rows.data) % 16 == 0;
  };
  const LinearSqMmaParams<In> params{p, aligned(p.x), aligned(p.g)};
  device.launch(linear_sq_mma_kernel<Traits>, grid, Traits::kThreads, params, Traits::kSharedBytes);
}

}  // namespace fisherfast
