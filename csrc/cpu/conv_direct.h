// SPDX-License-Identifier: Apache-2.0
// conv_sq_ where groups are too narrow for matrices (depthwise above all): a vector holds a number of groups, and its lanes
// have nothing to do with each other.
#pragma once

#include "cpu/conv_images.h"

namespace fisherfast {

// Positions along the last axis, a pixel of the frame and a row of g apart from the next.
struct Stretch {
  int64_t pixel, position, count;
};

constexpr int64_t kStretch = 128;  // most positions in one; as many of all kernel rows of x stay in L1

// The gradient of sample n, of groups side by side: [outputs, channels, K] per group.
template <class S>
struct DirectProblem {
  Images<S> x, g;                          // their channels are one of each group: the first of them
  int64_t channel_step_x, channel_step_g;  // from one channel of a group to the next, in elements
  int64_t groups, channels, outputs;       // channels of x and of g per group
  int64_t frame, P;                        // pixels of x's frame; positions
  Axes kernel;
  const int64_t* kernel_rows;  // [kernel[0] * kernel[1]]: pixels from a position's first to a kernel row's first
  int64_t stride, dilation;    // along the last axis, in pixels
  const Stretch* stretches;    // of an image
  int64_t stretch_count;
  int64_t samples;
  const int64_t* offsets;  // [samples + 1] or null: the images of a sample
  const float* weight;     // [samples] or null
  double* norms;           // [blocks, samples] or null

  int64_t gradient() const { return outputs * channels * product(kernel); }
};

template <class S>
struct DirectKernel {
  int64_t lanes, block_rows, block_columns;  // of vectors, and of the register blocks that matrices would have
  // Adds samples [first, last) of a block of groups to squares and sums, [gradient, lanes] each; sums may be null.
  void (*part)(const DirectProblem<S>&, int64_t block, int64_t first, int64_t last, double* squares, double* sums);
};

// Is it faster than matrices of every group?
bool direct_is_cheaper(const ConvCall& call);

void conv_direct(const ConvCall& call);

}  // namespace fisherfast
