// SPDX-License-Identifier: Apache-2.0
#include "cpu/conv_direct.h"

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "cpu/tile.h"

#define FISHERFAST_KERNEL "cpu/conv_direct_kernel.h"
#include "cpu/each_isa.h"

namespace fisherfast {
namespace {

constexpr int64_t kUnits = 16;  // groups and samples are cut into so many parts, whatever the number of threads

// The lines of g, cut where they are long.
std::vector<Stretch> stretches_of(const ConvGeometry& geometry) {
  const std::vector<int64_t> pixels = geometry.position_pixels();
  const int64_t width = geometry.positions[2];
  std::vector<Stretch> stretches;
  for (int64_t line = 0; line < static_cast<int64_t>(pixels.size()); line += width)
    for (int64_t start = 0; start < width; start += kStretch)
      stretches.push_back({pixels[line + start], line + start, std::min(kStretch, width - start)});
  return stretches;
}

// The first of the channels that every group has.
template <class S>
Images<S> first_channels(Images<S> images, int64_t groups) {
  const int64_t per_group = images.channels / groups;
  images.channels = groups;
  images.stride_c *= per_group;
  return images;
}

// Adds parts, [parts, blocks, gradient, lanes], to an accumulator, [groups, gradient].
void add_parts(const Sink& sink, const std::vector<double>& parts, int64_t groups, int64_t gradient, int64_t lanes,
               double scale) {
  const std::size_t part = ceil_div(groups, lanes) * gradient * lanes;
  for (int64_t group = 0; group < groups; ++group)
    for (int64_t i = 0; i < gradient; ++i) {
      double sum = 0;
      for (std::size_t index = (group / lanes * gradient + i) * lanes + group % lanes; index < parts.size(); index += part)
        sum += parts[index];
      add_to(sink, group * gradient + i, scale * sum);
    }
}

template <class S>
void run(const ConvCall& call) {
  const auto kernel = FISHERFAST_PICK(direct_kernel<S>)();
  const ConvGeometry& geometry = call.geometry;
  const int64_t groups = call.groups, N = call.samples.N, P = product(geometry.positions);
  const std::vector<Pixel> x_pixels = pixels_of(call.x, geometry.input, geometry.padding, geometry.frame);
  const std::vector<Pixel> g_pixels = pixels_of(call.g, geometry.positions, {}, geometry.positions);
  const std::vector<int64_t> x_holes = holes_of(x_pixels, geometry.frame), none, offsets = geometry.offset_pixels();
  std::vector<int64_t> kernel_rows;
  for (std::size_t k = 0; k < offsets.size(); k += geometry.kernel[2]) kernel_rows.push_back(offsets[k]);
  const std::vector<Stretch> stretches = stretches_of(geometry);
  const int64_t blocks = ceil_div(groups, kernel.lanes);
  std::vector<double> norms(call.sqnorm ? blocks * N : 0);
  const DirectProblem<S> problem{first_channels(images_of<S>(call.x, x_pixels, x_holes), groups),
                                 first_channels(images_of<S>(call.g, g_pixels, none), groups),
                                 call.x.stride(1),
                                 call.g.stride(1),
                                 groups,
                                 call.x.size(1) / groups,
                                 call.g.size(1) / groups,
                                 product(geometry.frame),
                                 P,
                                 geometry.kernel,
                                 kernel_rows.data(),
                                 geometry.stride[2],
                                 geometry.dilation[2],
                                 stretches.data(),
                                 static_cast<int64_t>(stretches.size()),
                                 N,
                                 call.samples.offsets,
                                 call.weight,
                                 call.sqnorm ? norms.data() : nullptr};
  const int64_t parts = std::min(N, ceil_div(kUnits, blocks)), size = problem.gradient() * kernel.lanes;
  std::vector<double> squares(parts * blocks * size), sums(call.total ? squares.size() : 0);
  const int64_t products = call.g.numel() * problem.channels * product(geometry.kernel);
  torch::stable::parallel_for(0, parts * blocks, ceil_div(parts * blocks, threads_for(products)),
                              [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t part = unit / blocks;
      kernel.part(problem, unit % blocks, part * N / parts, (part + 1) * N / parts, squares.data() + unit * size,
                  call.total ? sums.data() + unit * size : nullptr);
    }
  });
  add_parts(call.acc, squares, groups, problem.gradient(), kernel.lanes, call.scale);
  if (call.total) add_parts(call.total, sums, groups, problem.gradient(), kernel.lanes, 1.0);
  for (int64_t n = 0; call.sqnorm && n < N; ++n) {
    double norm = 0;
    for (int64_t block = 0; block < blocks; ++block) norm += norms[block * N + n];
    add_to(call.sqnorm, n, norm);
  }
}

// Register blocks of the matrix kernel and vectors of this one, of a position of all groups.
template <class S>
bool is_cheaper(const ConvCall& call) {
  constexpr double kVector = 1.3, kPacked = 1.5;  // against a multiply-add in a full register block, both measured
  const auto [lanes, rows, columns, part] = FISHERFAST_PICK(direct_kernel<S>)();
  const int64_t groups = call.groups, O = call.g.size(1) / groups, CK = call.x.size(1) / groups * product(call.geometry.kernel);
  const double direct = kVector * static_cast<double>(O * CK * ceil_div(groups, lanes));
  const double packed = kPacked * static_cast<double>(ceil_div(CK, lanes));
  const double matrices = static_cast<double>(ceil_div(O, rows) * ceil_div(CK, columns) * rows * columns / lanes) + 2 * packed;
  return direct < static_cast<double>(groups) * matrices;
}

}  // namespace

bool direct_is_cheaper(const ConvCall& call) {
  bool cheaper = false;
  dispatch_input("conv_sq_", call.g.scalar_type(), [&](auto type) { cheaper = is_cheaper<typename decltype(type)::type>(call); });
  return cheaper;
}

void conv_direct(const ConvCall& call) {
  dispatch_input("conv_sq_", call.g.scalar_type(), [&](auto type) { run<typename decltype(type)::type>(call); });
}

}  // namespace fisherfast
