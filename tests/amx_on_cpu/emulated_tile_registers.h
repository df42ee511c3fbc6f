// SPDX-License-Identifier: Apache-2.0
// In the place of cpu/tile_registers.h: the tile registers of AMX as arrays, and its instructions as Intel's manual says: products
// of pairs are added up in two sums, even and odd, and then to the cell; subnormal numbers are zeros on both sides.
#include <cfloat>

struct Registers {
  bool taken = false;
  float cells[2][2][16][16], left[2][16][32], right[2][16][2][16];  // right: [half, pair, even or odd, column]
};

inline Registers& registers() {
  static thread_local Registers all;
  return all;
}

inline Registers& taken() {
  if (!registers().taken) throw std::runtime_error("tile registers: used before they were taken");
  return registers();
}

inline float flushed(float value) { return __builtin_fabsf(value) < FLT_MIN ? 0.0f : value; }
inline float number(uint16_t bits) { return flushed(from_bits(static_cast<uint32_t>(bits) << 16)); }

inline void take_registers() { registers().taken = true; }
inline void release_registers() { std::memset(static_cast<void*>(&registers()), 0, sizeof(Registers)); }
inline void clear_cells() { std::memset(taken().cells, 0, sizeof taken().cells); }

inline void load_left(const uint16_t* at, int halves) {
  for (int i = 0; i < halves * 16 * 32; ++i) taken().left[i / 512][i / 32 % 16][i % 32] = number(at[i]);
}

inline void load_right(const uint16_t* at, int halves) {
  for (int i = 0; i < halves * 16 * 32; ++i) taken().right[i / 512][i / 32 % 16][i % 2][i / 2 % 16] = number(at[i]);
}

inline void multiply_halves(int left_halves, int right_halves) {
  Registers& r = taken();
  for (int i = 0; i < left_halves; ++i)
    for (int j = 0; j < right_halves; ++j)
      for (int row = 0; row < 16; ++row) {
        float sums[2][16]{};
        for (int k = 0; k < 32; ++k)
          for (int column = 0; column < 16; ++column)
            sums[k % 2][column] = flushed(__builtin_fmaf(r.left[i][row][k], r.right[j][k / 2][k % 2][column], sums[k % 2][column]));
        for (int column = 0; column < 16; ++column) {
          float& cell = r.cells[i][j][row][column];
          cell = flushed(cell + flushed(sums[0][column] + sums[1][column]));
        }
      }
}

inline void store_cells(Floats* cells) {
  for (int row = 0; row < 32; ++row)
    for (int half = 0; half < 2; ++half) std::memcpy(cells + row * 2 + half, taken().cells[row / 16][half][row % 16], sizeof *cells);
}
