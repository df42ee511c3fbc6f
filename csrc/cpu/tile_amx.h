// SPDX-License-Identifier: Apache-2.0
// Compiled by each_isa.h as a part of tile_kernel.h, in the place of tile_micro.h: a cell block by AMX, whose tile registers hold
// 16 x 16 sums in fp32 and take 32 rows of bfloat16 operands in one instruction.
//
// bf16x6, the arithmetic of the Triton kernels: a float is the sum of three bfloat16 numbers of 8 bits each, exactly. Of the nine
// products of such parts the six largest are taken; what is left out is some 2^-25 of the product, less than its rounding in
// fp32. Inputs in bfloat16 have one part, in float16 two.

constexpr int kCells = kBlockRows * kBlockVectors;
constexpr int64_t kStep = 32, kChain = 128;
constexpr bool kPacksAhead = false;  // panels are split before they are multiplied

#include "cpu/tile_rows.h"

// A panel is 2 x 16 columns; a step of its rows is a tile of either half in each part: [step, part, half, 16, 32].
constexpr int kParts = 3;
constexpr int64_t kTileSize = 16 * 32, kStepSize = kParts * 2 * kTileSize, kSplitSize = kDepth / kStep * kStepSize;

typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));
typedef Lanes<float>::Vector Floats;

// Bits 16 to 31 of the even row, with those of the odd row above them.
inline Words paired(Words even, Words odd) { return (even >> 16) | (odd & 0xffff0000u); }

// To 8 bits, the nearest ones: what is left over has either sign, so that what products leave out cancels in sums.
inline Words rounded(Floats value) { return ((Words)value + 0x8000u) & 0xffff0000u; }

// Pairs of numbers of two vectors, in parts so many vectors apart: a row of a tile. The last part has the last bits as they are.
template <int kCount>
void split_pairs(Floats even, Floats odd, Floats* out, int64_t stride) {
#pragma GCC unroll 3
  for (int part = 0; part + 1 < kCount; ++part) {
    const Words high_even = rounded(even), high_odd = rounded(odd);
    out[part * stride] = (Floats)paired(high_even, high_odd);
    even -= (Floats)high_even;
    odd -= (Floats)high_odd;
  }
  out[(kCount - 1) * stride] = (Floats)paired((Words)even, (Words)odd);
}

// A step, of which there are so many rows and halves. The rows of a tile are pairs of rows, or columns if kTurned.
template <int kCount, bool kTurned, class S>
void split_step(const S* in, int64_t stride, int64_t rows, int halves, uint16_t* out) {
  constexpr int64_t kPart = 2 * kTileSize / 32;
  const auto columns = [=](int64_t t, int half) { return t < rows ? load_wide(in + t * stride + half * 16) : Floats{}; };
  auto* tiles = reinterpret_cast<Floats*>(out);
  if constexpr (kTurned && kCount > 1) {  // two turns of floats are less work than one of every part
    for (int half = 0; half < halves; ++half) {
      Floats even[16], odd[16];
#pragma GCC unroll 16
      for (int pair = 0; pair < 16; ++pair) even[pair] = columns(2 * pair, half), odd[pair] = columns(2 * pair + 1, half);
      transpose<float>(even);
      transpose<float>(odd);
#pragma GCC unroll 16
      for (int column = 0; column < 16; ++column)
        split_pairs<kCount>(even[column], odd[column], tiles + half * 16 + column, kPart);
    }
  } else {
    for (int64_t pair = 0; pair < 16; ++pair)
      for (int half = 0; half < halves; ++half)
        split_pairs<kCount>(columns(2 * pair, half), columns(2 * pair + 1, half), tiles + half * 16 + pair, kPart);
    for (int half = 0; kTurned && half < 2; ++half) transpose<float>(tiles + half * 16);
  }
}

// Panels side by side, row by row: memory likes rows to be read on.
template <int kCount, bool kTurned, class S>
[[gnu::noinline]] void split_panels(const Matrix<S>& in, const Block& block, int64_t panels, int halves, uint16_t* out) {
  for (int s = 0; s < block.count; ++s) {
    const Segment& segment = block.segments[s];
    for (int64_t t = 0; t < segment.rows; t += kStep, out += kStepSize)
      for (int64_t p = 0; p < panels; ++p)
        split_step<kCount, kTurned>(in.data + (segment.row + t) * in.stride + p * kBlockRows, in.stride, segment.rows - t, halves,
                                    out + p * kSplitSize);
  }
}

#if defined(FISHERFAST_EMULATED_AMX)
#include "emulated_tile_registers.h"
#else
#include "cpu/tile_registers.h"
#endif

// Brings the tiles of a panel whose operand has them; false if it has none.
template <class X>
bool bring_parts(const X&, const Block&, int64_t, int, uint16_t*) {
  return false;
}

// A sample's products in a cell block, on their way to the cells: some vectors at a time, while the next ones are being
// multiplied.
struct Results {
  Floats c[kCells];
  int done = kCells;
  bool resumes, unfinished;
  float weight;
  double* norm;  // or null
  Target<float> to;
  Floats squares[4];

  void add(int count) {
    if (done == kCells) return;
    const int end = std::min(done + count, kCells);
    for (; done < end; ++done) {
      Floats value = c[done];
      if (resumes) value += to.carry[done];
      if (unfinished) {
        to.carry[done] = value;
        continue;
      }
      if (to.norms) squares[done % 4] += value * value;
      if (to.sums) to.sums[done] += weight * value;
      if (to.squares) to.squares[done] += weight * value * value;
    }
    if (done == kCells && to.norms && !unfinished)
      *norm += sum_of_lanes<float>((squares[0] + squares[1]) + (squares[2] + squares[3]));
  }

  void finish() { add(kCells); }
};

// A part of the left operand by one of the right; what of them is not at hand from the product before.
struct Product {
  int left, right;
  bool brings_left, brings_right;
};

// The products of a step, the smallest first. Each shares a part with the one before: where another thread of the core is busy,
// it is bringing tiles to registers that takes the time.
template <int kLeft, int kRight>
struct Order {
  int count = 0;
  Product products[kParts * (kParts + 1) / 2]{};

  constexpr Order() {
    int at_hand = -1;
    for (int left = kLeft - 1; left >= 0; --left) {
      const int rights = kRight < kParts - left ? kRight : kParts - left, first = at_hand < 0 ? 0 : at_hand;
      for (int k = 0; k < rights; ++k) {
        const int right = (first + k) % rights;
        products[count++] = {left, right, k == 0, right != at_hand};
        at_hand = right;
      }
    }
  }
};

// Multiplies copies of panels, in parts: of the left operand all, of the right one that at hand.
template <class R, class G, class X>
struct Multiplier {
  static_assert(std::is_same_v<R, float>);
  const G& g;
  const X& x;
  uint16_t* memory;
  int right_halves = 0;
  Results results;

  static int64_t size(int64_t left_panels) { return (left_panels + 1) * kSplitSize / 2; }

  Multiplier(const G& g, const X& x, float* memory) : g(g), x(x), memory(reinterpret_cast<uint16_t*>(memory)) {
    take_registers();
  }
  ~Multiplier() { release_registers(); }
  Multiplier(const Multiplier&) = delete;
  Multiplier& operator=(const Multiplier&) = delete;

  uint16_t* left_data(int64_t index) const { return memory + (index + 1) * kSplitSize; }

  template <class Operand>
  static int halves(const Operand& operand, int64_t index) {
    return operand.size() - index * kBlockRows > 16 ? 2 : 1;
  }

  void bring_left(const Block& block) const {
    const auto source = g.source(block, 0);
    int64_t in_place = 0;  // panels that lie in the input as a whole: not one with a column of ones
    while (in_place < g.panels() && g.source(block, in_place).data) ++in_place;
    if (in_place) split<true>(source, g.parts(), block, in_place, 2, left_data(0));
    for (int64_t p = in_place; p < g.panels(); ++p)
      split<true>(g.panel(block, p), g.parts(), block, 1, halves(g, p), left_data(p));
  }

  void bring_right(const Block& block, int64_t index) {
    right_halves = halves(x, index);
    if (bring_parts(x, block, index, right_halves, memory)) return;
    if (const auto source = x.source(block, index); source.data) {
      split<false>(source, x.parts(), block, 1, right_halves, memory);
    } else {
      split<false>(x.panel(block, index), x.parts(), block, 1, right_halves, memory);
    }
  }

  template <bool kTurned, class S>
  static void split(const Matrix<S>& in, int parts, const Block& block, int64_t panels, int halves, uint16_t* out) {
    const auto by_parts = parts == 1   ? split_panels<1, kTurned, S>
                          : parts == 2 ? split_panels<2, kTurned, S>
                                       : split_panels<3, kTurned, S>;
    by_parts(in, block, panels, halves, out);
  }

  // A cell block: the given panel of the left operand by the right one at hand; what lies outside is multiplied too.
  [[gnu::noinline]] void multiply(const Block& block, int64_t index, int64_t, const float* weight, const Target<float>& to) {
    const uint16_t *left = left_data(index), *right = memory;
    for (int s = 0; s < block.count; ++s) {
      const Segment& segment = block.segments[s];
      const int64_t steps = whole_steps(segment.rows) / kStep;
      if (steps == 0) continue;
      multiply_steps(left, right, halves(g, index), steps);
      results.finish();
      store_cells(results.c);
      results.done = 0;
      results.resumes = block.resumes;
      results.unfinished = block.unfinished;
      results.weight = weight ? weight[segment.n] : 1.0f;
      results.norm = to.norms ? to.norms + segment.n : nullptr;
      results.to = to;
      for (Floats& square : results.squares) square = Floats{};
      left += steps * kStepSize;
      right += steps * kStepSize;
    }
  }

  void multiply_steps(const uint16_t* left, const uint16_t* right, int left_halves, int64_t steps) {
    using Steps = void (Multiplier::*)(const uint16_t*, const uint16_t*, int, int64_t);
    static constexpr Steps kSteps[kParts][kParts] = {
        {&Multiplier::steps_of<1, 1>, &Multiplier::steps_of<1, 2>, &Multiplier::steps_of<1, 3>},
        {&Multiplier::steps_of<2, 1>, &Multiplier::steps_of<2, 2>, &Multiplier::steps_of<2, 3>},
        {&Multiplier::steps_of<3, 1>, &Multiplier::steps_of<3, 2>, &Multiplier::steps_of<3, 3>}};
    (this->*kSteps[g.parts() - 1][x.parts() - 1])(left, right, left_halves, steps);
  }

  template <int kLeft, int kRight>
  void steps_of(const uint16_t* left, const uint16_t* right, int left_halves, int64_t steps) {
    static constexpr Order<kLeft, kRight> kOrder;
    const int share = static_cast<int>(ceil_div(kCells, steps * kOrder.count));
    clear_cells();
    for (int64_t step = 0; step < steps; ++step, left += kStepSize, right += kStepSize) {
#pragma GCC unroll 6
      for (int k = 0; k < kOrder.count; ++k) {
        const Product& product = kOrder.products[k];
        if (product.brings_left) load_left(left + product.left * 2 * kTileSize, left_halves);
        if (product.brings_right) load_right(right + product.right * 2 * kTileSize, right_halves);
        multiply_halves(left_halves, right_halves);
        results.add(share);
      }
    }
  }

  void finish() { results.finish(); }
};
