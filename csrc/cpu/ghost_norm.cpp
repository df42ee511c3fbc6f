// SPDX-License-Identifier: Apache-2.0
// sqnorm[n] += |sum_p g[n,:,p] u[n,p,:]^T|^2 without that matrix: by pairs of positions, of which there are fewer than it has
// elements. Of a sample the Gram matrices over positions of g and over pixels of x, then their product offset by offset.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <type_traits>
#include <vector>

#include "cpu/conv_geometry.h"
#include "cpu/ghost_norm.h"
#include "cpu/gram.h"

#define FISHERFAST_KERNEL "cpu/ghost_norm_kernel.h"
#include "cpu/each_isa.h"

namespace fisherfast {
namespace {

constexpr int64_t kMostBytes = int64_t{48} << 20;  // of the Gram matrices of the samples at hand

// Lines are joined where they can be, and where all of a grid's do with gaps between them, to one with a mask.
template <class R>
Meetings<R> joined(const std::vector<PositionLine>& lines, int64_t step, bool same_grid) {
  Meetings<R> meetings{{}, step, {}};
  for (const PositionLine& line : lines) {
    PositionLine* last = meetings.lines.empty() ? nullptr : &meetings.lines.back();
    const int64_t gap = last ? line.first - last->first - last->count : 0;
    if (last && (same_grid || gap == 0) && last->pixel + (last->count + gap) * step == line.pixel) {
      last->count += gap + line.count;
    } else {
      meetings.lines.push_back(line);
    }
  }
  if (step != 1 || meetings.lines.size() != 1) return meetings;
  meetings.mask.resize(meetings.lines[0].count + kReadBeyond);
  for (const PositionLine& line : lines)
    std::fill_n(meetings.mask.begin() + (line.first - meetings.lines[0].first), line.count, R(1));
  return meetings;
}

// For each offset of the kernel.
template <class R>
std::vector<Meetings<R>> meetings_of(const ConvGeometry& geometry) {
  const auto& [input, positions, kernel, stride, padding, dilation, frame] = geometry;
  const bool same_grid = product(stride) == 1 && positions[1] == input[1] && positions[2] == input[2];
  std::vector<Meetings<R>> found;
  for (int64_t k = 0; k < product(kernel); ++k) {
    const Axes offset{k / (kernel[1] * kernel[2]), k / kernel[2] % kernel[1], k % kernel[2]};
    Axes begin, end, shift;
    for (int a = 0; a < 3; ++a) {  // positions p with 0 <= p stride + shift < input
      shift[a] = offset[a] * dilation[a] - padding[a];
      begin[a] = std::clamp<int64_t>(ceil_div(std::max<int64_t>(-shift[a], 0), stride[a]), 0, positions[a]);
      const int64_t room = std::max<int64_t>(input[a] - shift[a], 0);
      end[a] = std::clamp<int64_t>(ceil_div(room, stride[a]), begin[a], positions[a]);
    }
    std::vector<PositionLine> lines;
    for (int64_t a = begin[0]; a < end[0]; ++a)
      for (int64_t b = begin[1]; b < end[1] && begin[2] < end[2]; ++b) {
        const int64_t row = (a * stride[0] + shift[0]) * input[1] + b * stride[1] + shift[1];
        lines.push_back({(a * positions[1] + b) * positions[2] + begin[2], end[2] - begin[2],
                         row * input[2] + begin[2] * stride[2] + shift[2]});
      }
    found.push_back(joined<R>(lines, stride[2], same_grid));
  }
  return found;
}

// Images [N, C, *S] as rows of pixels, one row a channel; of a sample at a time, copied where pixels do not lie side by side.
template <class S>
struct PixelRows {
  const S* data;
  int64_t stride_n, stride_c, channels;
  std::vector<int64_t> from;  // of each pixel, or empty: they lie side by side

  PixelRows(const Tensor& images, const Axes& size)
      : data(static_cast<const S*>(images.const_data_ptr())),
        stride_n(images.stride(0)),
        stride_c(images.stride(1)),
        channels(images.size(1)),
        pixels_(product(size)) {
    const Axes step = steps_of(images);
    bool dense = true;
    for (int64_t a = 0; a < size[0]; ++a)
      for (int64_t b = 0; b < size[1]; ++b)
        for (int64_t c = 0; c < size[2]; ++c) {
          const int64_t place = a * step[0] + b * step[1] + c * step[2];
          dense = dense && place == static_cast<int64_t>(from.size());
          from.push_back(place);
        }
    if (dense) from.clear();
  }

  int64_t pixels() const { return pixels_; }
  int64_t copied() const { return from.empty() ? 0 : channels * pixels_; }

  Rows<S> of_sample(int64_t n, S* copy) const {
    const S* in = data + n * stride_n;
    if (from.empty()) return {in, 0, stride_c, 1, pixels_};
    FISHERFAST_PICK(bring_pixels<S>)(in, from, channels, stride_c, copy);
    return {copy, 0, pixels_, 1, pixels_};
  }

 private:
  int64_t pixels_;
};

template <class S>
struct GhostNorm {
  using R = compute_t<S>;
  PixelRows<S> x, g;
  std::vector<Meetings<R>> meetings;
  Sink sqnorm, size;

  int64_t gram_size() const { return x.pixels() * x.pixels() + g.pixels() * g.pixels() + kReadBeyond; }
  int64_t bytes() const { return gram_size() * sizeof(R) + ceil_div((x.copied() + g.copied()) * sizeof(S), 64) * 64; }

  void add(int64_t n, void* memory, int64_t threads) const {
    R *of_g = static_cast<R*>(memory), *of_x = of_g + g.pixels() * g.pixels();
    auto* copies = reinterpret_cast<S*>(of_g + gram_size());
    std::memset(of_g, 0, gram_size() * sizeof(R));
    add_gram(g.of_sample(n, copies), g.channels, of_g, threads);
    add_gram(x.of_sample(n, copies + g.copied()), x.channels, of_x, threads);
    PairSums sums;
    for (const Meetings<R>& of_offset : meetings)
      sums += FISHERFAST_PICK(pair_sums<R>)(of_g, of_x, g.pixels(), x.pixels(), of_offset);
    add_to(sqnorm, n, sums.sum);
    if (size) add_to(size, n, sums.size);
  }
};

void ghost_norm(Tensor sqnorm, Tensor x, Tensor g, OptionalTensor size, OptionalTensor flag, std::vector<int64_t> kernel,
                std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation) {
  if (stopped(flag, g, x, {})) return;
  if (g.numel() == 0 || x.numel() == 0) return;
  const ConvGeometry geometry(sizes_of(x), sizes_of(g), kernel, stride, padding, dilation);
  dispatch_input("ghost_norm_", g.scalar_type(), [&](auto type) {
    using S = typename decltype(type)::type;
    const GhostNorm<S> norms{
        {x, geometry.input}, {g, geometry.positions}, meetings_of<compute_t<S>>(geometry), sink_of(sqnorm), sink_of(size)};
    const int64_t N = g.size(0), threads = threads_for(N * norms.gram_size() * (g.size(1) + x.size(1)) / 2);
    const int64_t bytes = ceil_div(norms.bytes(), 64) * 64;
    // Samples are shared out; where they are few, or take much memory, each is.
    const int64_t workers = N < threads || threads * bytes > kMostBytes ? 1 : threads;
    const SharedScratch memory(workers * bytes);
    std::atomic<int64_t> next{0}, slot{0};
    torch::stable::parallel_for(0, workers, 1, [&](int64_t, int64_t) {
      char* own = static_cast<char*>(memory.data()) + slot++ * bytes;
      for (int64_t n = next++; n < N; n = next++) norms.add(n, own, threads / workers);
    });
  });
}

}  // namespace
}  // namespace fisherfast

STABLE_TORCH_LIBRARY_FRAGMENT(fisherfast_cpp, m) {
  m.def(
      "ghost_norm_(Tensor(a!) sqnorm, Tensor x, Tensor g, *, Tensor(b!)? size=None, Tensor(c!)? flag=None, int[] kernel=[], "
      "int[] stride=[], int[] padding=[], int[] dilation=[]) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(fisherfast_cpp, CPU, m) { m.impl("ghost_norm_", TORCH_BOX(&fisherfast::ghost_norm)); }
