// SPDX-License-Identifier: Apache-2.0
// Which products a convolution's Gram matrix consists of.
//
// A[(c,k),(c',k')] = sum_p x[c, p s + k d - padding] x[c', p s + k' d - padding] depends, but for the pixels that are summed
// over, only on the shift D = k' - k. Seen from the pixel q that k looks at, k sees the window of pixels k d - padding,
// k d - padding + s, ... The windows of all k that share a D and a residue modulo s are cut into pieces that are wholly
// inside or outside of each: the sum of a piece is computed once and added for every k whose window holds it. Nothing is
// subtracted, so nothing cancels, and where q or q + D lies outside of x there is nothing to sum.
#pragma once

#include <vector>

#include "cpu/conv_geometry.h"
#include "cpu/sym.h"

namespace fisherfast {

// A box of pixels that is at hand, for some images: those of q, and as many more as the shifts reach.
struct Box {
  Axes first, count;  // of q
  Axes size;          // with those after it
  int64_t images;

  int64_t pixels() const { return images * product(size); }
  bool operator==(const Box& other) const {
    return first == other.first && count == other.count && size == other.size && images == other.images;
  }
};

// The axis along which images that are too large are cut: no shift goes back on it.
int64_t band_axis(const ConvGeometry& geometry);

// The shifts with k' >= k and their pixels, numbered as in a box; shifts without pixels are left out.
std::vector<Shift> shifts_of(const ConvGeometry& geometry, const Box& box);

// What an image and a group of channels cost by shifts of the pixels, or with patches unfolded, and which is cheaper. Counted
// in multiply-adds of vectors; what bringing the operands and short runs cost, was measured in them.
struct Block {
  int64_t rows, lanes, vectors;
};
int64_t shifted_work(const ConvGeometry& geometry, int64_t channels, const Block& block);
int64_t unfolded_work(const ConvGeometry& geometry, int64_t channels, const Block& block);
bool shifts_are_cheaper(const ConvGeometry& geometry, int64_t channels, const Block& block);

}  // namespace fisherfast
