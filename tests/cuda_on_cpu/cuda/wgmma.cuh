// SPDX-License-Identifier: Apache-2.0
// In the place of csrc/cuda/wgmma.cuh: the same instructions, as the PTX ISA's pages on mbarrier, cp.async.bulk.tensor, its swizzling modes
// and wgmma's descriptors and fragments say, for one thread of an emulated cluster.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "cuda/mma.cuh"
#include "emulator.h"

#define FISHERFAST_HAS_WGMMA

namespace fisherfast {

using emulator::require;

struct TensorMap {
  const uint16_t* data;
  int64_t sizes[3], strides[2];  // from the last axis on
  int box[3];
  bool t_outside;  // [t, n, feature]
};

constexpr int kWarpgroup = 128;
constexpr int kBoxFeatures = 64;

inline char* shared_boxes() { return emulator::block().shared(); }

// The address of a place in the block's shared memory, and that place in the memory of another block.
inline int64_t shared_offset(const void* pointer) {
  const int64_t offset = static_cast<const char*>(pointer) - emulator::block().shared();
  require(offset >= 0 && offset < static_cast<int64_t>(emulator::kSharedBytes), "shared memory: address");
  return offset;
}
inline void* in_block(const void* pointer, int rank) { return emulator::cluster->blocks.at(rank).shared() + shared_offset(pointer); }
inline void require_there(int rank) { require(emulator::cluster->blocks.at(rank).threads > 0, "shared memory of a block that has left"); }

// The copy engine and the tensor cores exchange 16-byte vectors within 1024 bytes, by address.
inline int64_t swizzled_128(int64_t address) { return address ^ ((address >> 7 & 7) << 4); }

struct Barrier {
  int expected, pending, bytes;
  uint32_t phase;

  void init(int arrivals) { *this = {arrivals, arrivals, 0, 0}; }
  void complete(int arrivals, int more_bytes) {
    pending -= arrivals;
    bytes += more_bytes;
    require(pending >= 0, "mbarrier: more arrivals than it expects");
    if (pending > 0 || bytes != 0) return;
    pending = expected;
    phase ^= 1;
  }
  void expect(int more) { complete(1, more); }
  void arrive_at(int rank) {
    require_there(rank);
    static_cast<Barrier*>(in_block(this, rank))->complete(1, 0);
  }
  void wait(uint32_t parity) {
    emulator::wait_until([&] { return phase != parity; });
  }
};

inline void fence_barrier_init() {}
inline void fence_async_proxy() {}

inline void prefetch_map(const TensorMap&) {}

inline void copy_box(char* memory, int64_t offset, const TensorMap& map, Barrier* barrier, int feature, int middle, int outer) {
  int64_t to = offset;
  for (int b = 0; b < map.box[2]; ++b)
    for (int a = 0; a < map.box[1]; ++a)
      for (int f = 0; f < map.box[0]; ++f, to += 2) {
        const bool inside = outer + b < map.sizes[2] && middle + a < map.sizes[1] && feature + f < map.sizes[0];
        const uint16_t value = inside ? map.data[(outer + b) * map.strides[1] + (middle + a) * map.strides[0] + feature + f] : 0;
        std::memcpy(memory + swizzled_128(to), &value, 2);
      }
  barrier->complete(0, static_cast<int>(offset - to));
}

inline void load_box(void* shared, const TensorMap& map, Barrier& barrier, int feature, int t, int n, uint16_t blocks) {
  const int64_t offset = shared_offset(shared);
  require(offset % 128 == 0, "cp.async.bulk.tensor: address");
  for (int rank = 0; rank < static_cast<int>(emulator::cluster->blocks.size()); ++rank) {
    if (!(blocks >> rank & 1)) continue;
    char* const memory = emulator::cluster->blocks[rank].shared();
    auto* const there = static_cast<Barrier*>(in_block(&barrier, rank));
    const emulator::Action copy = [=, &map] {
      require_there(rank);
      copy_box(memory, offset, map, there, feature, map.t_outside ? n : t, map.t_outside ? t : n);
    };
    if (emulator::cluster->timing.eager_copies) {
      copy();
    } else {
      emulator::cluster->pending.push_back(copy);
    }
  }
}
inline void load_box(void* shared, const TensorMap& map, Barrier& barrier, int feature, int t, int n) {
  load_box(shared, map, barrier, feature, t, n, 1 << emulator::block().rank);
}

inline int cluster_rank() { return emulator::block().rank; }
inline int cluster_size() { return static_cast<int>(emulator::cluster->blocks.size()); }
inline void cluster_arrive() {
  require(emulator::self().arrived_at < 0, "the cluster's barrier: two arrivals without a wait");
  emulator::self().arrived_at = emulator::arrive(emulator::cluster->barrier, static_cast<int>(emulator::cluster->fibers.size()));
}
inline void cluster_wait() { emulator::wait_for(emulator::cluster->barrier, std::exchange(emulator::self().arrived_at, -2)); }
inline void named_sync(int barrier, int threads) { emulator::wait(emulator::block().barriers[barrier], threads); }

inline void prefetch_l2(const void* address) { static_cast<void>(*static_cast<const volatile char*>(address)); }

template <int kRegisters>
void give_registers() {}
template <int kRegisters>
void take_registers() {}

inline uint64_t operand(const void* boxes, int box_bytes) {
  require(shared_offset(boxes) % 1024 == 0 && box_bytes % 1024 == 0, "wgmma: an operand's address");
  return 1ull << 62 | uint64_t{1024 >> 4} << 32 | static_cast<uint64_t>(box_bytes >> 4) << 16 | shared_offset(boxes) >> 4;
}
constexpr uint64_t kNextRows = 16 * 128 >> 4;

// Element (feature, t) of an operand that is stored feature by feature: blocks of 64 features, groups of 8 rows, rows of 128 bytes.
template <typename T>
float operand_element(uint64_t descriptor, int feature, int t) {
  const auto field = [&](int shift) { return static_cast<int64_t>(descriptor >> shift & 0x3fff) << 4; };
  const int64_t address = field(0) + feature / 64 * field(16) + t / 8 * field(32) + t % 8 * 128 + feature % 64 * 2;
  T value;
  std::memcpy(&value.x, emulator::block().shared() + swizzled_128(address), 2);
  return static_cast<float>(value);
}

inline void wgmma_fence() {}
inline void wgmma_commit() {
  emulator::self().products.commit();
  emulator::pause();
}
// A product is the whole warpgroup's: it is over when all have asked for it, and then for all.
template <int kPending>
void wgmma_wait() {
  auto& fibers = emulator::cluster->fibers;
  const size_t first = emulator::cluster->current / kWarpgroup * kWarpgroup, groups = emulator::self().products.but(kPending);
  emulator::wait_until([&] {
    for (size_t fiber = first; fiber < first + kWarpgroup; ++fiber)
      if (fibers[fiber].products.committed.size() < groups) return false;
    return true;
  });
  for (size_t fiber = first; fiber < first + kWarpgroup; ++fiber) fibers[fiber].products.complete(groups);
}

// Element e of a thread: row l / 4 of its warp's 16, or 8 below; of every 8 columns l % 4 * 2 and the next.
template <typename T, int kHalf, bool kStart>
void wgmma(float (&c)[kHalf], uint64_t a, uint64_t b) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  const auto product = [&c, a, b, lane, warp] {
    float left[2][16];
    for (int e = 0; e < 2; ++e)
      for (int t = 0; t < 16; ++t) left[e][t] = operand_element<T>(a, warp * 16 + lane / 4 + 8 * e, t);
    for (int column = 0; column < kHalf / 2; ++column) {
      float right[16];
      for (int t = 0; t < 16; ++t) right[t] = operand_element<T>(b, column / 2 * 8 + lane % 4 * 2 + column % 2, t);
      for (int e = 0; e < 2; ++e) {
        float& value = c[column / 2 * 4 + e * 2 + column % 2];
        double sum = kStart ? 0 : value;
        for (int t = 0; t < 16; ++t) sum += static_cast<double>(left[e][t]) * right[t];
        value = static_cast<float>(sum);
      }
    }
  };
  if (emulator::cluster->timing.eager_products) {
    product();
  } else {
    emulator::self().products.open.push_back(product);
  }
}

}  // namespace fisherfast
