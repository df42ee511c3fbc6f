// SPDX-License-Identifier: Apache-2.0
// Compiled by each_isa.h as a part of tile_amx.h: the instructions of AMX. In assembler, since GCC's own functions for them do
// not say which memory they read and write.
//
// Registers 0 to 3 hold the cells, two rows of two; 4 and 5 the left operand's halves, 6 and 7 the right one's.

// The registers' shapes: eight of 16 rows of 64 bytes. They are this thread's from here until they are released.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

inline void take_registers() {
  const TileShapes shapes;
  asm volatile("ldtilecfg %0" ::"m"(shapes));
}

inline void release_registers() { asm volatile("tilerelease"); }

inline void clear_cells() {
  asm volatile("tilezero %%tmm0\n\ttilezero %%tmm1\n\ttilezero %%tmm2\n\ttilezero %%tmm3" ::: "memory");
}

inline void load_left(const uint16_t* at, int halves) {
  asm volatile("tileloadd (%0,%1,1), %%tmm4" ::"r"(at), "r"(int64_t{64}) : "memory");
  if (halves > 1) asm volatile("tileloadd (%0,%1,1), %%tmm5" ::"r"(at + kTileSize), "r"(int64_t{64}) : "memory");
}

inline void load_right(const uint16_t* at, int halves) {
  asm volatile("tileloadd (%0,%1,1), %%tmm6" ::"r"(at), "r"(int64_t{64}) : "memory");
  if (halves > 1) asm volatile("tileloadd (%0,%1,1), %%tmm7" ::"r"(at + kTileSize), "r"(int64_t{64}) : "memory");
}

inline void multiply_halves(int left_halves, int right_halves) {
  asm volatile("tdpbf16ps %%tmm6, %%tmm4, %%tmm0" ::: "memory");
  if (right_halves > 1) asm volatile("tdpbf16ps %%tmm7, %%tmm4, %%tmm1" ::: "memory");
  if (left_halves == 1) return;
  asm volatile("tdpbf16ps %%tmm6, %%tmm5, %%tmm2" ::: "memory");
  if (right_halves > 1) asm volatile("tdpbf16ps %%tmm7, %%tmm5, %%tmm3" ::: "memory");
}

inline void store_cells(Floats* cells) {
  constexpr int64_t kStride = kBlockVectors * kVectorBytes;
  asm volatile("tilestored %%tmm0, (%0,%1,1)" ::"r"(cells), "r"(kStride) : "memory");
  asm volatile("tilestored %%tmm1, (%0,%1,1)" ::"r"(cells + 1), "r"(kStride) : "memory");
  asm volatile("tilestored %%tmm2, (%0,%1,1)" ::"r"(cells + 16 * kBlockVectors), "r"(kStride) : "memory");
  asm volatile("tilestored %%tmm3, (%0,%1,1)" ::"r"(cells + 16 * kBlockVectors + 1), "r"(kStride) : "memory");
}
