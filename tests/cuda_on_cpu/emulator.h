// SPDX-License-Identifier: Apache-2.0
// Runs a CUDA kernel, compiled as C++, on the CPU: a block is a ring of fibers, one a thread, which change places at barriers.
// What a kernel may use: the indices, shared memory, __syncthreads, __shfl_down_sync, and the instructions of cuda/mma.cuh.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#define __device__
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __shared__ thread_local  // all fibers of a block run on one thread

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
constexpr int kWarp = 32;

struct Barrier {
  int arrived = 0, generation = 0;
};

struct Copy {
  void* target;
  const void* source;
  int bytes;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  bool done = false;
  int turn = 0;                      // which of the warp's two boards it writes on next
  std::vector<Copy> issued;          // asynchronous copies not committed yet
  std::vector<std::vector<Copy>> groups;  // committed and still under way
};

struct Warp {
  Barrier barrier;
  unsigned char boards[2][kWarp][16];  // what lanes show to each other; two, so that one barrier is enough
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  Barrier barrier;
  ucontext_t outside;
  std::function<void()> kernel;
  bool eager;         // whether asynchronous copies happen when they are issued, or as late as they may
  std::string error;  // the first thing a real GPU would not have taken well
};

inline Block* block = nullptr;

inline Fiber& self() { return block->fibers[threadIdx.x]; }
inline Warp& warp() { return block->warps[threadIdx.x / kWarp]; }

inline void yield() {
  const unsigned from = threadIdx.x, count = static_cast<unsigned>(block->fibers.size());
  unsigned to = from;
  do to = (to + 1) % count;
  while (to != from && block->fibers[to].done);
  if (to == from) {
    if (block->fibers[from].done) setcontext(&block->outside);
    return;
  }
  threadIdx.x = to;
  swapcontext(&block->fibers[from].context, &block->fibers[to].context);
}

inline void wait(Barrier& barrier, int members) {
  const int generation = barrier.generation;
  if (++barrier.arrived == members) {
    barrier.arrived = 0;
    ++barrier.generation;
  }
  while (barrier.generation == generation) yield();
}

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
    block->kernel();
  } catch (const std::runtime_error& error) {  // cannot leave the fiber
    block->error = error.what();
    setcontext(&block->outside);
  }
  self().done = true;
  yield();
}

// Runs one block of a grid; shared memory keeps what the block before left there.
inline void run_block(int threads, bool eager, std::function<void()> kernel) {
  Block current{std::vector<Fiber>(threads), std::vector<Warp>(threads / kWarp), {}, {}, std::move(kernel), eager, {}};
  block = &current;
  for (Fiber& fiber : current.fibers) {
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, &enter, 0);
  }
  threadIdx = {};
  swapcontext(&current.outside, &current.fibers[0].context);
  if (!current.error.empty()) throw std::runtime_error(current.error);
}

}  // namespace emulator

inline void __syncthreads() { emulator::wait(emulator::block->barrier, static_cast<int>(emulator::block->fibers.size())); }

template <typename T>
T __shfl_down_sync(unsigned, T value, int distance) {
  struct Shown {
    alignas(16) T value;
  };
  const auto& shown = emulator::exchange(Shown{value});
  const int from = static_cast<int>(threadIdx.x % emulator::kWarp) + distance;
  return from < emulator::kWarp ? shown[from].value : value;
}
