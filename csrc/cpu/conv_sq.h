// SPDX-License-Identifier: Apache-2.0
// The work of conv_sq_ on the CPU, as its kernels see it: conv_sq.cpp plans it, conv_sq_kernel.h does one tile.
#pragma once

#include "cpu/conv_images.h"
#include "cpu/tile.h"

namespace fisherfast {

// A vector's worth of columns, copied from a pixel and those around it; what is too much the next one overwrites.
struct Move {
  int64_t from, to;  // from the first channel of the pixel that a position looks at first; to the start of the panel
};

// A column of a tile, and its place in a row of the accumulator.
struct Place {
  int64_t from, to;
};

// Per group: the gradient of a sample is g^T x, with the columns of x the patches that the positions look at. Columns are
// in the order (channel block, kernel offset, channel), so that neighbours are neighbours in the images and a tile's
// columns still are one range of the accumulator's.
template <class R>
struct ConvProblem : Tiles {
  const R* g;                    // of the images at hand, [panel of channels, row, channel]: the panels of every group
  int64_t rows;                  // in g, from one panel to the next
  const R* x;                    // their frames, [image, pixel, C]; of pairs [image, part, vector of channels, pixel, channel]
  int64_t frame, group;          // elements of a frame; from the first channel of a group to that of the next one
  int64_t part;                  // elements of one of its parts
  int64_t pair = 0;              // if frames hold pairs, those of a pixel and the one so many pixels further, else 0
  const int64_t* positions;      // [P]: where in a frame the patch of a position starts
  int64_t P, channels, columns;  // positions; per group, input channels and columns
  int64_t outputs;               // channels of g per group
  int parts;                     // of the inputs, in bfloat16
  const Move* moves;             // by panel
  const int64_t* first_move;     // [panels + 1]
  const Place* places;           // [columns]: by tile, then by place
};

// The code for the instruction set in use: of a tile, and of how channels of an image are brought, for x and for a panel of g.
template <class S>
struct ConvKernel : TileKernel<ConvProblem<compute_t<S>>> {
  using Bring = void (*)(const ConvProblem<compute_t<S>>&, const Images<S>&, int64_t n, int64_t first, int64_t count,
                         compute_t<S>* out, int64_t pixel_stride);
  Bring bring_x, bring_g;
};

}  // namespace fisherfast
