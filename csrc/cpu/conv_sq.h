// SPDX-License-Identifier: Apache-2.0
// The work of conv_sq_ on the CPU, as its kernels see it: conv_sq.cpp plans it, conv_sq_kernel.h does one tile.
#pragma once

#include "cpu/conv_images.h"
#include "cpu/tile.h"

namespace fisherfast {

// A vector's worth of columns, copied from a pixel and those around it; what is too much the next one overwrites.
struct Move {
  int64_t from, to;  // from the first channel of the pixel that a position looks at first; to the start of the tile
};

// Per group: the gradient of a sample is g^T x, with the columns of x the patches that the positions look at. Columns are
// in the order (channel block, kernel offset, channel), so that neighbours are neighbours in the images and a tile's
// columns still are one range of the accumulator's.
template <class R>
struct ConvProblem : Tiles {
  Rows<R> g;                   // [rows, O] of the images at hand
  const R* x;                  // their frames, [image, pixel, C]
  int64_t frame;               // elements of a frame
  const int64_t* positions;    // [P]: where in a frame the patch of a position starts
  int64_t P, channels, columns;  // positions; per group, input channels and columns
  int64_t outputs;             // channels of g per group
  const Move* moves;           // by column of tiles
  const int64_t* first_move;   // [across + 1]
  const int64_t* places;       // [columns]: a column's place in a row of the accumulator
};

}  // namespace fisherfast
