// SPDX-License-Identifier: Apache-2.0
// Runs CUDA kernels, compiled as C++, on the CPU: the blocks of a cluster are a ring of fibers, one a thread, which change places where
// they wait. What a kernel may use: the indices, shared memory, __syncthreads, __shfl_down_sync, and the instructions of cuda/mma.cuh
// and cuda/wgmma.cuh. Static shared memory is there for one block at a time only.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#define __device__
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __shared__ thread_local  // all fibers run on one thread

struct Index {
  unsigned x = 0, y = 0, z = 0;
};
inline Index threadIdx, blockIdx, gridDim;

struct uint4 {
  uint32_t x, y, z, w;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

using std::max;
using std::min;

namespace emulator {

constexpr size_t kStackBytes = 64 * 1024;
constexpr int kWarp = 32, kNamedBarriers = 16;
constexpr size_t kSharedBytes = 227 * 1024;

using Action = std::function<void()>;

inline void require(bool condition, const char* message) {
  if (!condition) throw std::runtime_error(message);
}

// When asynchronous work happens: as soon as it is asked for, or as late as it may; and whether threads take turns by chance.
struct Timing {
  bool eager_copies, eager_products, by_chance;
};

struct Barrier {
  int arrived = 0, generation = 0;
};

// What a thread has asked for in groups: committed ones, and the one it is still adding to.
struct Groups {
  std::vector<Action> open;
  std::vector<std::vector<Action>> committed;
  size_t done = 0;

  void commit() {
    committed.push_back(std::move(open));
    open.clear();
  }
  // How many groups are over when at most `pending` are not.
  size_t but(size_t pending) const { return committed.size() > pending ? committed.size() - pending : 0; }
  void complete(size_t groups) {
    for (; done < groups; ++done)
      for (const Action& action : std::exchange(committed[done], {})) action();
  }
};

struct Warp {
  Barrier barrier;
  unsigned char boards[2][kWarp][16];  // what lanes show to each other; two, so that one barrier is enough
};

struct Block {
  int rank, threads;  // threads that have not left
  Index place;
  std::vector<Warp> warps;
  Barrier barriers[kNamedBarriers];  // the first is that of __syncthreads
  std::unique_ptr<char[]> storage{new char[kSharedBytes + 1024]};

  char* shared() const { return storage.get() + (1024 - reinterpret_cast<uintptr_t>(storage.get()) % 1024) % 1024; }
};

struct Fiber {
  Block* block;
  unsigned thread;
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  bool done = false;
  int arrived_at = -2;  // the generation of the cluster's barrier, between arrival and wait
  int turn = 0;  // which of the warp's two boards it writes on next
  Groups copies, products;
};

struct Cluster {
  std::vector<Block> blocks;
  std::vector<Fiber> fibers;
  Barrier barrier;
  ucontext_t outside;
  Action kernel;
  Timing timing;
  std::vector<Action> pending;  // copies that nobody has asked to see yet
  size_t current = 0, idle = 0;  // which fiber runs; how often one has given way since anybody got on
  uint32_t chance = 1;
  std::string error;            // the first thing a real GPU would not have taken well
};

inline Cluster* cluster = nullptr;

inline Fiber& self() { return cluster->fibers[cluster->current]; }
inline Block& block() { return *self().block; }
inline Warp& warp() { return block().warps[threadIdx.x / kWarp]; }

inline void enter_indices() {
  threadIdx.x = self().thread;
  blockIdx = block().place;
}

// Lets the others run. When nobody can get on, the copy asked for last happens; when there is none, nothing ever will.
inline void yield() {
  const size_t count = cluster->fibers.size(), from = cluster->current;
  const bool by_chance = cluster->timing.by_chance;
  if (++cluster->idle > (by_chance ? 32 : 2) * count) {  // by chance some wait long for their turn
    require(!cluster->pending.empty(), "all threads wait for each other");
    const Action copy = std::move(cluster->pending.back());
    cluster->pending.pop_back();
    copy();
    cluster->idle = 0;
  }
  size_t to = from;
  if (by_chance) to = ((cluster->chance = cluster->chance * 1664525 + 1013904223) >> 8) % count;
  const size_t first = to;
  do to = (to + 1) % count;
  while (to != first && cluster->fibers[to].done);
  if (cluster->fibers[to].done) setcontext(&cluster->outside);
  if (to == from) return;
  cluster->current = to;
  enter_indices();
  swapcontext(&cluster->fibers[from].context, &cluster->fibers[to].context);
}

template <typename Ready>
void wait_until(const Ready& ready) {
  while (!ready()) yield();
  cluster->idle = 0;
}

// Lets others go ahead where nothing is waited for.
inline void pause() {
  if (cluster->timing.by_chance) yield();
  cluster->idle = 0;
}

// The generation that ends when all have arrived.
inline int arrive(Barrier& barrier, int members) {
  const int generation = barrier.generation;
  if (++barrier.arrived == members) {
    barrier.arrived = 0;
    ++barrier.generation;
  }
  return generation;
}
inline void wait_for(const Barrier& barrier, int generation) {
  require(generation == barrier.generation || generation == barrier.generation - 1, "a barrier is waited for without arrival");
  wait_until([&] { return barrier.generation != generation; });
}
inline void wait(Barrier& barrier, int members) { wait_for(barrier, arrive(barrier, members)); }

// Shows a value to the warp and returns what all lanes show.
template <typename T>
const T (&exchange(const T& value))[kWarp] {
  static_assert(sizeof(T) == 16);
  auto& board = warp().boards[self().turn ^= 1];
  std::memcpy(board[threadIdx.x % kWarp], &value, sizeof(T));
  wait(warp().barrier, kWarp);
  return reinterpret_cast<const T(&)[kWarp]>(board);
}

inline void enter() {
  try {
    cluster->kernel();
    self().done = true;
    --block().threads;
    cluster->idle = 0;
    yield();
  } catch (const std::runtime_error& error) {  // cannot leave the fiber
    cluster->error = error.what();
    setcontext(&cluster->outside);
  }
}

// Runs one cluster of `count` blocks, the first of them at `place`. Dynamic shared memory holds no numbers, static what was left there.
inline void run_cluster(int threads, int count, Index place, Timing timing, Action kernel) {
  Cluster current;
  cluster = &current;
  current.timing = timing;
  current.kernel = std::move(kernel);
  current.blocks = std::vector<Block>(count);
  current.fibers = std::vector<Fiber>(static_cast<size_t>(count) * threads);
  for (int rank = 0; rank < count; ++rank) {
    Block& block = current.blocks[rank];
    block.rank = rank;
    block.threads = threads;
    block.place = {place.x + rank, place.y, place.z};
    block.warps = std::vector<Warp>(threads / kWarp);
    std::memset(block.shared(), 0x7f, kSharedBytes);
    for (int thread = 0; thread < threads; ++thread) {
      Fiber& fiber = current.fibers[static_cast<size_t>(rank) * threads + thread];
      fiber.block = &block;
      fiber.thread = thread;
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = kStackBytes;
      fiber.context.uc_link = nullptr;
      makecontext(&fiber.context, &enter, 0);
    }
  }
  enter_indices();
  swapcontext(&current.outside, &current.fibers[0].context);
  require(current.error.empty(), current.error.c_str());
  require(current.pending.empty(), "a copy was still under way when the last thread left");
}

// Runs all clusters of a grid, one after the other.
inline void run_grid(Index grid, int threads, int cluster_size, Timing timing, const Action& kernel) {
  gridDim = grid;
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; x += cluster_size) run_cluster(threads, cluster_size, {x, y, z}, timing, kernel);
}

}  // namespace emulator

inline void __syncthreads() {
  emulator::wait(emulator::block().barriers[0], static_cast<int>(emulator::block().warps.size()) * emulator::kWarp);
}

template <typename T>
T __shfl_down_sync(unsigned, T value, int distance) {
  struct Shown {
    alignas(16) T value;
  };
  const auto& shown = emulator::exchange(Shown{value});
  const int from = static_cast<int>(threadIdx.x % emulator::kWarp) + distance;
  return from < emulator::kWarp ? shown[from].value : value;
}
