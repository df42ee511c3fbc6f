// SPDX-License-Identifier: Apache-2.0
// The instructions of Hopper (sm_90a) behind the warpgroup kernels: barriers in shared memory, the bulk copy engine, products of
// a warpgroup, clusters, register budgets. Nothing here knows what is computed with them.
#pragma once

#include <cuda.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>

#include "cuda/mma.cuh"

// Other targets know none of these instructions: there a kernel that uses them is left empty, and never launched.
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define FISHERFAST_HAS_WGMMA
#endif

namespace fisherfast {

// Where a tensor [n, t, feature] lies, and the box of it that one copy takes.
struct TensorMap {
  CUtensorMap map;  // its axes ordered by their strides
  bool t_outside;   // [t, n, feature]
};

constexpr int kWarpgroup = 128;   // threads
constexpr int kBoxFeatures = 64;  // 128 bytes, the widest row that the copy engine swizzles

// The first byte of the block's dynamic shared memory at a multiple of 1024, as swizzled boxes want it.
inline __device__ char* shared_boxes() {
  extern __shared__ char dynamic_shared[];
  return dynamic_shared + (1024 - shared_address(dynamic_shared) % 1024) % 1024;
}

// A barrier in shared memory: a phase ends when the arrivals and the bytes that it expects have come.
struct Barrier {
  uint64_t state;

  __device__ void init(int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&state)), "r"(arrivals) : "memory");
  }
  // Arrives, and lets the phase wait for so many bytes more.
  __device__ void expect(int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&state)), "r"(bytes) : "memory");
  }
  // Arrives at the barrier in this one's place in block `rank` of the cluster.
  __device__ void arrive_at(int rank) {
    asm volatile(
        "{\n.reg .b32 remote;\n"
        "mapa.shared::cluster.u32 remote, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(shared_address(&state)),
        "r"(rank)
        : "memory");
  }
  // Waits for the end of the phase of that parity: of the last one, or of the one before it, which has ended.
  __device__ void wait(uint32_t parity) {
    uint32_t ended = 0;
    while (!ended) {
      asm volatile(
          "{\n.reg .pred ended;\n"
          "mbarrier.try_wait.parity.shared::cta.b64 ended, [%1], %2;\n"
          "selp.u32 %0, 1, 0, ended;\n}"
          : "=r"(ended)
          : "r"(shared_address(&state)), "r"(parity)
          : "memory");
    }
  }
};

// Starts a line on its way into L2, for whoever asks next.
inline __device__ void prefetch_l2(const void* address) { asm volatile("prefetch.global.L2 [%0];" ::"l"(address)); }

// Shows barriers that one thread has initialised to the cluster and to the copy engine; the cluster's barrier comes next.
inline __device__ void fence_barrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// Orders this thread's own stores to shared memory before what the copy engine and the tensor cores do next.
inline __device__ void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Fetches the map itself, which the first copy would wait for.
inline __device__ void prefetch_map(const TensorMap& map) { asm volatile("prefetch.tensormap [%0];" ::"l"(&map.map) : "memory"); }

// Copies the box that begins at (n, t, feature); what is outside the tensor becomes zeros. The barrier counts all its bytes.
inline __device__ void load_box(void* shared, const TensorMap& map, Barrier& barrier, int feature, int t, int n) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(
          shared_address(shared)),
      "l"(&map.map), "r"(shared_address(&barrier)), "r"(feature), "r"(map.t_outside ? n : t), "r"(map.t_outside ? t : n)
      : "memory");
}

// The same into every block of the cluster whose bit is set, in the same place, for the barrier in the same place.
inline __device__ void load_box(void* shared, const TensorMap& map, Barrier& barrier, int feature, int t, int n,
                                uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(shared_address(shared)),
      "l"(&map.map), "r"(shared_address(&barrier)), "r"(feature), "r"(map.t_outside ? n : t), "r"(map.t_outside ? t : n),
      "h"(blocks)
      : "memory");
}

inline __device__ int cluster_rank() {
  int rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

inline __device__ int cluster_size() {
  int size;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}

// A barrier of all threads of the cluster: what a thread did before it arrives is done for those who have waited.
inline __device__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.release;" ::: "memory"); }
inline __device__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }

// A barrier of `threads` threads; 0 is the one of __syncthreads.
inline __device__ void named_sync(int barrier, int threads) {
  asm volatile("barrier.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// How many registers a thread of this warpgroup may use from here on: fewer, or more, than at the launch.
template <int kRegisters>
__device__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// An operand whose rows are boxes: [features / 64][t][64] from a multiple of 1024 bytes on, swizzled, so many bytes from one
// block of 64 features to the next. The product runs over t; 16 rows are 2048 bytes further.
inline __device__ uint64_t operand(const void* boxes, int box_bytes) {
  constexpr uint64_t kSwizzle128 = 1ull << 62, kEightRows = 8 * 128;
  const auto field = [](uint64_t bytes) { return bytes >> 4 & 0x3fff; };
  return kSwizzle128 | field(kEightRows) << 32 | field(box_bytes) << 16 | field(shared_address(boxes));
}
constexpr uint64_t kNextRows = 16 * 128 >> 4;  // to add to an operand

// Before the first product after registers of c were touched; closes a group of products; waits until at most kPending are under
// way.
inline __device__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
inline __device__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
__device__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// c += a^T b for a [16, 64], b [16, 2 kHalf] of type T and c [64, 2 kHalf] in float, spread over the warpgroup. To start, c = a^T
// b, whatever c was: then its registers are free until here.
template <typename T, int kHalf, bool kStart>
__device__ void wgmma(float (&c)[kHalf], uint64_t a, uint64_t b);

#define FISHERFAST_C0                                                                                              \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
  "%24, %25, %26, %27, %28, %29, %30, %31"
#define FISHERFAST_C32                                                                                               \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, " \
  "%54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define FISHERFAST_C64                                                                                               \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, " \
  "%86, %87, %88, %89, %90, %91, %92, %93, %94, %95"

#define FISHERFAST_F8(how, i) \
  how(c[i]), how(c[i + 1]), how(c[i + 2]), how(c[i + 3]), how(c[i + 4]), how(c[i + 5]), how(c[i + 6]), how(c[i + 7])
#define FISHERFAST_F32(how, i) \
  FISHERFAST_F8(how, i), FISHERFAST_F8(how, i + 8), FISHERFAST_F8(how, i + 16), FISHERFAST_F8(how, i + 24)
// The number behind the operands says whether c counts; the ones at the end that both operands are transposed, those before that
// neither is negated.
#define FISHERFAST_WGMMA(T, type, kHalf, kStart, counts, shape, registers, A, B, ...)                      \
  template <>                                                                                              \
  inline __device__ void wgmma<T, kHalf, kStart>(float (&c)[kHalf], uint64_t a, uint64_t b) {              \
    asm volatile("{\n.reg .pred counts;\nsetp.ne.b32 counts, " counts                                      \
                 ", 0;\n"                                                                                  \
                 "wgmma.mma_async.sync.aligned." shape ".f32." type "." type " {" registers "}, " A ", " B \
                 ", counts, 1, 1, 1, 1;\n}"                                                                \
                 : __VA_ARGS__                                                                             \
                 : "l"(a), "l"(b));                                                                        \
  }
#define FISHERFAST_WGMMA_64(T, type, kStart, counts, how)                                                 \
  FISHERFAST_WGMMA(T, type, 64, kStart, counts, "m64n128k16", FISHERFAST_C0 FISHERFAST_C32, "%64", "%65", \
                   FISHERFAST_F32(how, 0), FISHERFAST_F32(how, 32))
#define FISHERFAST_WGMMA_96(T, type, kStart, counts, how)                                                                \
  FISHERFAST_WGMMA(T, type, 96, kStart, counts, "m64n192k16", FISHERFAST_C0 FISHERFAST_C32 FISHERFAST_C64, "%96", "%97", \
                   FISHERFAST_F32(how, 0), FISHERFAST_F32(how, 32), FISHERFAST_F32(how, 64))

FISHERFAST_WGMMA_64(torch::headeronly::BFloat16, "bf16", true, "0", "=f")
FISHERFAST_WGMMA_64(torch::headeronly::BFloat16, "bf16", false, "1", "+f")
FISHERFAST_WGMMA_64(torch::headeronly::Half, "f16", true, "0", "=f")
FISHERFAST_WGMMA_64(torch::headeronly::Half, "f16", false, "1", "+f")
FISHERFAST_WGMMA_96(torch::headeronly::BFloat16, "bf16", true, "0", "=f")
FISHERFAST_WGMMA_96(torch::headeronly::BFloat16, "bf16", false, "1", "+f")
FISHERFAST_WGMMA_96(torch::headeronly::Half, "f16", true, "0", "=f")
FISHERFAST_WGMMA_96(torch::headeronly::Half, "f16", false, "1", "+f")

}  // namespace fisherfast
