// SPDX-License-Identifier: Apache-2.0
// acc[o,c,k] += scale * sum_n w_n (sum_p g[n,o,p] x[n,c, p stride + k dilation - padding])^2.
//
// Some samples at a time: their images are brought to a layout in which positions follow each other and channels are side
// by side; what is left is linear_sq_ of g and the unfolded x, whose rows exist only while they are packed.
#include "cpu/conv_sq.h"

#include <algorithm>
#include <vector>

#include "cpu/conv_direct.h"

#define FISHERFAST_KERNEL "cpu/conv_sq_kernel.h"
#define FISHERFAST_WITH_AMX
#include "cpu/each_isa.h"

namespace fisherfast {
namespace {

// Of images at a time, which should fit into L2; more where they have too few positions to make up for a visit to the
// accumulator, and at least those of one sample.
constexpr int64_t kImageBytes = int64_t{2} << 20, kMostImageBytes = int64_t{8} << 20, kLeastRows = 4096;

int64_t images_at_a_time(int64_t bytes, int64_t positions) {
  return std::max<int64_t>(1, std::min(std::max(kImageBytes / bytes, ceil_div(kLeastRows, positions)), kMostImageBytes / bytes));
}

// What a column of the unfolded input is.
struct Columns {
  std::vector<int64_t> from;    // elements after the first of a patch
  std::vector<int64_t> places;  // in a row of the accumulator

  // Blocks of at least a vector of channels, or of all where there are fewer: a block of one kernel offset is one run.
  Columns(const std::vector<int64_t>& offsets, int64_t channels, int64_t pixel_stride, int64_t vector_stride, int64_t lanes) {
    const int64_t blocks = std::max<int64_t>(1, channels / lanes), K = static_cast<int64_t>(offsets.size());
    for (int64_t block = 0; block < blocks; ++block)
      for (int64_t k = 0; k < K; ++k)
        for (int64_t c = block * channels / blocks; c < (block + 1) * channels / blocks; ++c) {
          from.push_back(offsets[k] * pixel_stride + c / lanes * vector_stride + c % lanes);
          places.push_back(c * K + k);
        }
  }
};

// How to copy the columns of every panel, in vectors.
struct Moves {
  std::vector<Move> moves;
  std::vector<int64_t> first{0};

  Moves(const std::vector<int64_t>& from, int64_t panel, int64_t lanes) {
    const auto columns = static_cast<int64_t>(from.size());
    for (int64_t begin = 0; begin < columns; begin += panel) {
      const int64_t end = std::min(begin + panel, columns);
      for (int64_t column = begin, next = begin; column < end; column = next) {
        while (next < end && next - column < lanes && from[next] == from[column] + next - column) ++next;
        moves.push_back({from[column], column - begin});
      }
      first.push_back(static_cast<int64_t>(moves.size()));
    }
  }
};

// The columns of every tile in the accumulator's order.
std::vector<Place> places_of(const std::vector<int64_t>& to, int64_t tile) {
  const auto columns = static_cast<int64_t>(to.size());
  std::vector<Place> places;
  for (int64_t column = 0; column < columns; ++column) places.push_back({column % tile, to[column]});
  const auto by_place = [](const Place& a, const Place& b) { return a.to < b.to; };
  for (int64_t begin = 0; begin < columns; begin += tile)
    std::sort(places.begin() + begin, places.begin() + std::min(begin + tile, columns), by_place);
  return places;
}

// body(image, unit), for images [first, last) and the units that an image is cut into.
template <class Body>
void for_images(int64_t first, int64_t last, int64_t units, int64_t elements, const Body& body) {
  constexpr int64_t kGrain = 16384;  // elements below which a second thread does not pay
  torch::stable::parallel_for(first * units, last * units, 1 + kGrain * units / (elements + 1), [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) body(unit / units, unit % units);
  });
}

template <class S>
void run(const ConvCall& call) {
  using R = compute_t<S>;
  const Tensor &x = call.x, &g = call.g;
  const ConvGeometry& geometry = call.geometry;
  const ImageSamples& samples = call.samples;
  const int64_t C = x.size(1), O = g.size(1), M = g.size(0), P = product(geometry.positions), groups = call.groups;
  const std::vector<Pixel> x_pixels = pixels_of(x, geometry.input, geometry.padding, geometry.frame);
  const std::vector<Pixel> g_pixels = pixels_of(g, geometry.positions, {}, geometry.positions);
  const std::vector<int64_t> x_holes = holes_of(x_pixels, geometry.frame), none;
  ConvProblem<R> problem{};
  problem.squares = {call.acc, call.scale};
  problem.sums = {call.total, 1.0};
  problem.P = P;
  problem.channels = C / groups;
  problem.outputs = O / groups;
  problem.parts = bfloat16_parts<S>;
  problem.columns = problem.channels * product(geometry.kernel);
  const int64_t least_products = problem.parts < 3 ? 56 : 100;  // three parts are much to unfold: 64 and 96 channels lose
  const bool pays = matrix_registers_pay({samples.N, 0, M * P, nullptr}, problem.outputs, problem.columns, least_products);
  const auto kernel = FISHERFAST_PICK_TILES(R, pays, conv_kernel<S>);
  const int64_t pixels = product(geometry.frame);
  std::vector<int64_t> positions = geometry.position_pixels();
  // Images are split before they are unfolded, where they are whole pairs of positions and vectors of channels.
  const bool pairs = pays && geometry.positions[2] % 2 == 0 && problem.channels % kernel.lanes == 0;
  problem.pair = pairs ? positions[1] - positions[0] : 0;
  problem.part = pixels * C;
  problem.frame = (problem.pair ? problem.parts : 1) * problem.part;
  problem.group = problem.pair ? pixels * problem.channels : problem.channels;
  const int64_t pixel_stride = problem.pair ? kernel.lanes : C,
                vector_stride = problem.pair ? pixels * kernel.lanes : kernel.lanes;
  for (int64_t& position : positions) position *= pixel_stride;
  problem.positions = positions.data();
  const Columns columns(geometry.offset_pixels(), problem.channels, pixel_stride, vector_stride, kernel.lanes);
  problem.longest = samples.longest() * P;
  problem.flush_every = blocks_per_flush(most_blocks({samples.N, 0, M * P, nullptr}), problem.flush_every);

  const int64_t panels = ceil_div(problem.outputs, kernel.block_rows), x_units = ceil_div(C, kernel.lanes);
  const int64_t g_size = groups * panels * kernel.block_rows * P;
  const int64_t images = images_at_a_time((problem.frame + g_size) * sizeof(R), P);
  const int64_t threads = threads_for(std::min(M, images) * P * O * problem.columns);
  problem.tiling = plan(problem, problem.outputs, problem.columns, kernel.block_rows, kernel.block_columns, sizeof(R),
                        ceil_div(threads, groups), true);
  problem.tiling.groups = groups;
  const Moves moves(columns.from, kernel.block_columns, kernel.lanes);
  const std::vector<Place> places = places_of(columns.places, problem.tiling.columns);
  problem.places = places.data();
  problem.moves = moves.moves.data();
  problem.first_move = moves.first.data();

  const int64_t most = std::max(std::min(M, images), samples.longest());
  const SharedScratch memory((most * (problem.frame + g_size) + 2 * kernel.lanes) * sizeof(R));
  auto* frames = static_cast<R*>(memory.data());
  R* rows =
      frames + ceil_div(most * problem.frame, kernel.lanes) * kernel.lanes + kernel.lanes;  // frames are read in whole vectors
  problem.x = frames;
  problem.g = rows;
  problem.rows = most * P;
  const Images<S> x_images = images_of<S>(x, x_pixels, x_holes), g_images = images_of<S>(g, g_pixels, none);
  std::vector<int64_t> offsets;
  for (int64_t first = 0, last = 0; first < samples.N; first = last) {
    last = samples.fit(first, images);
    const int64_t begin = samples.begin(first), end = samples.begin(last);
    for_images(begin, end, x_units + groups * panels, problem.frame + g_size, [&](int64_t image, int64_t unit) {
      if (unit < x_units) {
        const int64_t channel = unit * kernel.lanes, count = std::min(kernel.lanes, C - channel);
        R* out = frames + (image - begin) * problem.frame + unit * vector_stride;
        return kernel.bring_x(problem, x_images, image, channel, count, out, pixel_stride);
      }
      unit -= x_units;
      const int64_t channel = unit % panels * kernel.block_rows, count = std::min(kernel.block_rows, problem.outputs - channel);
      R* out = rows + (unit * problem.rows + (image - begin) * P) * kernel.block_rows;
      kernel.bring_g(problem, g_images, image, unit / panels * problem.outputs + channel, count, out, kernel.block_rows);
    });
    problem.samples = {last - first, P, (end - begin) * P, nullptr};
    if (samples.offsets) {
      offsets.clear();
      for (int64_t n = first; n <= last; ++n) offsets.push_back((samples.begin(n) - begin) * P);
      problem.samples.offsets = offsets.data();
    }
    problem.weight = call.weight ? call.weight + first : nullptr;
    run_tiles(problem, kernel, threads, call.sqnorm, first);
  }
}

void conv_sq(Tensor acc, Tensor x, Tensor g, double scale, OptionalTensor weight, OptionalTensor offsets, OptionalTensor total,
             OptionalTensor sqnorm, OptionalTensor flag, std::vector<int64_t> stride, std::vector<int64_t> padding,
             std::vector<int64_t> dilation, int64_t groups) {
  if (stopped(flag, g, x, weight)) return;
  if (offsets) check_offsets({offsets->size(0) - 1, 0, g.size(0), offsets->const_data_ptr<int64_t>()});
  if (g.numel() == 0 || acc.numel() == 0) return;
  const ImageSamples samples{offsets ? offsets->size(0) - 1 : g.size(0), offsets ? offsets->const_data_ptr<int64_t>() : nullptr};
  const ConvGeometry geometry(sizes_of(x), sizes_of(g), sizes_of(acc), stride, padding, dilation);
  const ConvCall call{
      x, g, geometry, groups, samples, data_or_null<const float>(weight), scale, sink_of(acc), sink_of(total), sink_of(sqnorm)};
  if (direct_is_cheaper(call)) return conv_direct(call);
  dispatch_input("conv_sq_", g.scalar_type(), [&](auto type) { run<typename decltype(type)::type>(call); });
}

}  // namespace
}  // namespace fisherfast

STABLE_TORCH_LIBRARY_FRAGMENT(fisherfast_cpp, m) {
  m.def("conv_sq_(Tensor(a!) acc, Tensor x, Tensor g, " FISHERFAST_OUTPUTS
        ", int[] stride=[], int[] padding=[], int[] dilation=[], int groups=1) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(fisherfast_cpp, CPU, m) { m.impl("conv_sq_", TORCH_BOX(&fisherfast::conv_sq)); }
