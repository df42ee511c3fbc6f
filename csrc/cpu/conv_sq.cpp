// SPDX-License-Identifier: Apache-2.0
// acc[o,c,k] += scale * sum_n w_n (sum_p g[n,o,p] x[n,c, p stride + k dilation - padding])^2.
//
// Some samples at a time: their images are brought to a layout in which positions follow each other and channels are side
// by side; what is left is linear_sq_ of g and the unfolded x, whose rows exist only while they are packed.
#include "cpu/conv_sq.h"

#include <algorithm>
#include <vector>

#define FISHERFAST_KERNEL "cpu/conv_sq_kernel.h"
#include "cpu/each_isa.h"

namespace fisherfast {
namespace {

constexpr int64_t kImageBytes = int64_t{8} << 20;  // of images at a time, but at least those of one sample

// What a column of the unfolded input is.
struct Columns {
  std::vector<int64_t> from;    // elements after the first of a patch
  std::vector<int64_t> places;  // in a row of the accumulator

  // Blocks of at least a vector of channels, or of all where there are fewer: a block of one kernel offset is one run.
  Columns(const std::vector<int64_t>& offsets, int64_t channels, int64_t pixel_stride, int64_t lanes) {
    const int64_t blocks = std::max<int64_t>(1, channels / lanes), K = static_cast<int64_t>(offsets.size());
    for (int64_t block = 0; block < blocks; ++block)
      for (int64_t k = 0; k < K; ++k)
        for (int64_t c = block * channels / blocks; c < (block + 1) * channels / blocks; ++c) {
          from.push_back(offsets[k] * pixel_stride + c);
          places.push_back(c * K + k);
        }
  }
};

// How to copy the columns of the tiles, in vectors.
struct Moves {
  std::vector<Move> moves;
  std::vector<int64_t> first{0};

  Moves(const std::vector<int64_t>& from, const Tiling& tiling, int64_t lanes) {
    const auto columns = static_cast<int64_t>(from.size());
    for (int64_t begin = 0; begin < columns; begin += tiling.columns) {
      const int64_t end = std::min(begin + tiling.columns, columns);
      for (int64_t column = begin, next = begin; column < end; column = next) {
        while (next < end && next - column < lanes && from[next] == from[column] + next - column) ++next;
        moves.push_back({from[column], column - begin});
      }
      first.push_back(static_cast<int64_t>(moves.size()));
    }
  }
};

// Samples of images: one each, or those between the offsets.
struct ImageSamples {
  int64_t N;
  const int64_t* offsets;  // or null

  int64_t begin(int64_t n) const { return offsets ? offsets[n] : n; }

  // The end of the samples from first on that fit into a number of images: at least one.
  int64_t fit(int64_t first, int64_t images) const {
    int64_t last = first + 1;
    while (last < N && begin(last + 1) - begin(first) <= images) ++last;
    return last;
  }

  int64_t longest() const {
    int64_t images = 0;
    for (int64_t n = 0; n < N; ++n) images = std::max(images, begin(n + 1) - begin(n));
    return images;
  }
};

// Brings images [first, last) to `out`, one after the other.
template <class S>
void bring_images(const Images<S>& images, int64_t first, int64_t last, compute_t<S>* out, int64_t size, int64_t lanes) {
  constexpr int64_t kGrain = 16384;  // elements below which a second thread does not pay
  const auto bring = FISHERFAST_PICK(bring_channels<S>);
  const int64_t blocks = ceil_div(images.channels, lanes), units = (last - first) * blocks;
  torch::stable::parallel_for(0, units, 1 + kGrain * blocks / (size + 1), [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t image = unit / blocks, block = unit % blocks;
      bring(images, first + image, block, out + image * size + block * lanes, images.channels);
    }
  });
}

template <class S>
void run(ConvProblem<compute_t<S>> problem, const Tensor& x, const Tensor& g, const ConvGeometry& geometry, const ImageSamples& samples,
         const Sink& sqnorm, int64_t groups) {
  using R = compute_t<S>;
  const auto kernel = FISHERFAST_PICK(conv_kernel<R>)();
  const int64_t C = x.size(1), O = g.size(1), M = g.size(0), P = product(geometry.positions);
  const std::vector<Pixel> x_pixels = pixels_of(x, geometry.input, geometry.padding, geometry.frame);
  const std::vector<Pixel> g_pixels = pixels_of(g, geometry.positions, {}, geometry.positions);
  const std::vector<int64_t> x_holes = holes_of(x_pixels, geometry.frame), none;
  std::vector<int64_t> positions = geometry.position_pixels();
  for (int64_t& position : positions) position *= C;

  problem.frame = product(geometry.frame) * C;
  problem.positions = positions.data();
  problem.P = P;
  problem.channels = C / groups;
  problem.outputs = O / groups;
  const Columns columns(geometry.offset_pixels(), problem.channels, C, kernel.lanes);
  problem.columns = static_cast<int64_t>(columns.from.size());
  problem.places = columns.places.data();
  problem.longest = samples.longest() * P;

  const int64_t images = std::max<int64_t>(1, kImageBytes / static_cast<int64_t>((problem.frame + P * O) * sizeof(R)));
  const int64_t threads = threads_for(std::min(M, images) * P * O * problem.columns);
  problem.tiling = plan(problem, problem.outputs, problem.columns, kernel.block_rows, kernel.block_columns, sizeof(R),
                        ceil_div(threads, groups), static_cast<bool>(sqnorm));
  problem.tiling.groups = groups;
  const Moves moves(columns.from, problem.tiling, kernel.lanes);
  problem.moves = moves.moves.data();
  problem.first_move = moves.first.data();

  const int64_t most = std::max(std::min(M, images), samples.longest());
  const SharedScratch memory((most * (problem.frame + P * O) + 2 * kernel.lanes) * sizeof(R));
  auto* frames = static_cast<R*>(memory.data());
  R* rows = frames + most * problem.frame + kernel.lanes;  // frames are read in whole vectors
  problem.x = frames;
  const Images<S> x_images = images_of<S>(x, x_pixels, x_holes), g_images = images_of<S>(g, g_pixels, none);
  const float* weight = problem.weight;
  std::vector<int64_t> offsets;
  for (int64_t first = 0, last = 0; first < samples.N; first = last) {
    last = samples.fit(first, images);
    const int64_t begin = samples.begin(first), end = samples.begin(last);
    bring_images(x_images, begin, end, frames, problem.frame, kernel.lanes);
    bring_images(g_images, begin, end, rows, P * O, kernel.lanes);
    problem.g = {rows, P * O, O, 1, O};
    problem.samples = {last - first, P, (end - begin) * P, nullptr};
    if (samples.offsets) {
      offsets.clear();
      for (int64_t n = first; n <= last; ++n) offsets.push_back((samples.begin(n) - begin) * P);
      problem.samples.offsets = offsets.data();
    }
    problem.weight = weight ? weight + first : nullptr;
    run_tiles(problem, kernel, threads, sqnorm, first);
  }
}

void conv_sq(Tensor acc, Tensor x, Tensor g, double scale, OptionalTensor weight, OptionalTensor offsets, OptionalTensor total,
             OptionalTensor sqnorm, OptionalTensor flag, std::vector<int64_t> stride, std::vector<int64_t> padding,
             std::vector<int64_t> dilation, int64_t groups) {
  if (stopped(flag, g, x, weight)) return;
  if (offsets) check_offsets({offsets->size(0) - 1, 0, g.size(0), offsets->const_data_ptr<int64_t>()});
  if (g.numel() == 0 || acc.numel() == 0) return;
  const ConvGeometry geometry(acc, x, g, stride, padding, dilation);
  const ImageSamples samples{offsets ? offsets->size(0) - 1 : g.size(0), offsets ? offsets->const_data_ptr<int64_t>() : nullptr};
  const Tiles tiles{{}, data_or_null<const float>(weight), {sink_of(acc), scale}, {sink_of(total), 1.0}};
  dispatch_input("conv_sq_", g.scalar_type(), [&](auto type) {
    using S = typename decltype(type)::type;
    run<S>({tiles}, x, g, geometry, samples, sink_of(sqnorm), groups);
  });
}

}  // namespace
}  // namespace fisherfast

STABLE_TORCH_LIBRARY_FRAGMENT(fisherfast_cpp, m) {
  m.def("conv_sq_(Tensor(a!) acc, Tensor x, Tensor g, " FISHERFAST_OUTPUTS
        ", int[] stride=[], int[] padding=[], int[] dilation=[], int groups=1) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(fisherfast_cpp, CPU, m) { m.impl("conv_sq_", TORCH_BOX(&fisherfast::conv_sq)); }
