// SPDX-License-Identifier: Apache-2.0
// acc[i,j] += scale * sum_n w_n sum_p u[n,p,i] u[n,p,j] for j >= i, u the patches of x: KFAC's input factor.
//
// Some images at a time, or a band of one: brought to panels in which pixels follow each other and channels are side by side,
// so that a shift of the pixels is a shift of a pointer; conv_gram_plan.h says which shifts and which pixels. Where channels
// are too few to fill a panel, the patches are unfolded into panels instead, as channels of an image of positions.
#include <algorithm>
#include <atomic>
#include <string>
#include <vector>

#include "cpu/conv_gram_plan.h"
#include "cpu/sym.h"

#define FISHERFAST_KERNEL "cpu/sym_kernel.h"
#include "cpu/each_isa.h"

namespace fisherfast {
namespace {

// Of pixels at a time: a panel of them stays in L2 beside a tile's results, and makes up for the visit to the accumulator.
constexpr int64_t kPixels = 3072;

constexpr const char* kRoutes[] = {"cheapest", "shifted", "unfolded"};
std::atomic<int> forced_route{0};

struct __attribute__((visibility("hidden"))) GramCall {
  const Tensor& x;
  const ConvGeometry& geometry;
  int64_t groups;
  bool bias;
  const float* weight;  // [N] or null
  double scale;
  Sink acc;
  int64_t size;
};

// Brings images as they are.
template <class S>
class Pixels {
 public:
  using R = compute_t<S>;

  Pixels(const GramCall& call, const SymKernel<S>& kernel) : call_(call), kernel_(kernel) {}

  ConvGeometry geometry() const { return call_.geometry; }
  int64_t channels() const { return call_.x.size(1) / call_.groups; }
  int64_t offsets() const { return product(call_.geometry.kernel); }

  void look_at(const Box& box) {
    pixels_ = pixels_of(call_.x, box.size, {}, box.size);
    images_ = images_of<S>(call_.x, pixels_, holes_);
    const Axes steps = steps_of(call_.x);
    for (int a = 0; a < 3; ++a) images_.data += box.first[a] * steps[a];
  }

  // Channels [first, first + count) of a group's.
  void bring(int64_t image, int64_t group, int64_t first, int64_t count, R* out, int64_t width) const {
    for (int64_t c = 0; c < count; c += kernel_.lanes)
      kernel_.bring(images_, image, group * channels() + first + c, std::min(kernel_.lanes, count - c), out + c, width);
  }

 private:
  const GramCall& call_;
  const SymKernel<S>& kernel_;
  std::vector<Pixel> pixels_;
  std::vector<int64_t> holes_;
  Images<S> images_{};
};

// Brings patches: images whose pixels are the positions and whose channels are (c, k).
template <class S>
class Patches {
 public:
  using R = compute_t<S>;

  Patches(const GramCall& call, const SymKernel<S>& kernel)
      : call_(call), data_(static_cast<const S*>(call.x.const_data_ptr())), steps_(steps_of(call.x)), lanes_(kernel.lanes) {
    const ConvGeometry& geometry = call.geometry;
    for (int64_t a = 0; a < geometry.kernel[0]; ++a)
      for (int64_t b = 0; b < geometry.kernel[1]; ++b)
        for (int64_t c = 0; c < geometry.kernel[2]; ++c) {
          const Axes k{a, b, c};
          Axes& start = starts_.emplace_back();
          for (int i = 0; i < 3; ++i) start[i] = k[i] * geometry.dilation[i] - geometry.padding[i];
        }
  }

  ConvGeometry geometry() const {
    const Axes& P = call_.geometry.positions;
    return {{P.begin(), P.end()}, {P.begin(), P.end()}, {1, 1, 1}, {}, {}, {}};
  }
  int64_t channels() const { return call_.x.size(1) / call_.groups * static_cast<int64_t>(starts_.size()); }
  int64_t offsets() const { return 1; }

  void look_at(const Box& box) { box_ = box; }

  void bring(int64_t image, int64_t group, int64_t first, int64_t count, R* out, int64_t width) const {
    const auto K = static_cast<int64_t>(starts_.size());
    const S* in = data_ + image * call_.x.stride(0) + group * (call_.x.size(1) / call_.groups) * call_.x.stride(1);
    const int64_t zeros = (lanes_ - count % lanes_) % lanes_;
    for (int64_t a = 0; a < box_.size[0]; ++a)
      for (int64_t b = 0; b < box_.size[1]; ++b, out += box_.size[2] * width) {
        for (int64_t c = 0; c < count; ++c) {
          const int64_t channel = (first + c) / K;
          bring_line(in + channel * call_.x.stride(1), starts_[first + c - channel * K], box_.first[0] + a, box_.first[1] + b,
                     out + c, width);
        }
        for (int64_t p = 0; p < box_.size[2]; ++p) std::fill_n(out + p * width + count, zeros, R(0));
      }
  }

 private:
  // What a kernel offset sees from the positions along the last axis.
  void bring_line(const S* in, const Axes& start, int64_t a, int64_t b, R* out, int64_t width) const {
    const ConvGeometry& geometry = call_.geometry;
    const int64_t count = box_.size[2], stride = geometry.stride[2];
    const int64_t at[] = {a * geometry.stride[0] + start[0], b * geometry.stride[1] + start[1],
                          box_.first[2] * stride + start[2]};
    const int64_t begin = std::clamp<int64_t>((stride - 1 - at[2]) / stride, 0, count);
    int64_t end = std::clamp<int64_t>((geometry.input[2] - at[2] + stride - 1) / stride, begin, count);
    for (int i = 0; i < 2; ++i)
      if (at[i] < 0 || at[i] >= geometry.input[i]) end = begin;
    in += at[0] * steps_[0] + at[1] * steps_[1] + at[2] * steps_[2];
    for (int64_t p = 0; p < begin; ++p) out[p * width] = 0;
    for (int64_t p = begin; p < end; ++p) out[p * width] = widen(in[p * stride * steps_[2]]);
    for (int64_t p = end; p < count; ++p) out[p * width] = 0;
  }

  const GramCall& call_;
  const S* data_;
  Axes steps_;
  int64_t lanes_;
  std::vector<Axes> starts_;  // of every kernel offset, seen from position 0
  Box box_{};
};

// body(unit) for all units, handed out one by one.
template <class Body>
void for_units(int64_t units, int64_t threads, const Body& body) {
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, std::min(threads, units), 1, [&](int64_t, int64_t) {
    for (int64_t unit = next++; unit < units; unit = next++) body(unit);
  });
}

template <class S, class Source>
void run(const GramCall& call, Source source, const SymKernel<S>& kernel) {
  using R = compute_t<S>;
  constexpr int64_t kWorkPerThread = 1 << 16;  // with less, a second thread does not pay
  const ConvGeometry geometry = source.geometry();
  const int64_t N = call.x.size(0), axis = band_axis(geometry), channels = source.channels();
  const int64_t further = (geometry.kernel[axis] - 1) * geometry.dilation[axis], extent = geometry.input[axis];
  const int64_t band = std::clamp<int64_t>(kPixels * extent / product(geometry.input), 1, extent);
  const int64_t images = std::min(N, std::max<int64_t>(1, kPixels / product(geometry.input)));
  const int64_t work = call.groups * images * shifted_work(geometry, channels, {kernel.rows, kernel.lanes, kernel.vectors});
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), 1 + work / kWorkPerThread);

  SymProblem<R> problem{};
  problem.step = geometry.stride[2];
  problem.groups = call.groups;
  problem.channels = channels;
  problem.width = panel_vectors(channels, kernel.rows, kernel.lanes, kernel.vectors) * kernel.lanes;
  problem.panels = (channels + problem.width - 1) / problem.width;
  problem.K = source.offsets();
  problem.size = call.size;
  problem.acc = call.acc;
  problem.scale = call.scale;
  const std::vector<R> ones(kernel.rows, R(1));
  problem.ones = call.bias ? ones.data() : nullptr;

  const int64_t most = images * product(geometry.input) / extent * std::min(extent, band + further);
  const int64_t panels = call.groups * problem.panels, elements = panels * most * problem.width;
  const SharedScratch memory((1 + (call.weight != nullptr)) * elements * sizeof(R));
  auto* right = static_cast<R*>(memory.data());
  R* left = call.weight ? right + elements : right;
  problem.right = right;
  problem.left = left;
  const int64_t rows = (channels + kernel.rows - 1) / kernel.rows + call.bias;
  Box planned{};
  std::vector<Shift> shifts;
  problem.shifts = &shifts;
  for (int64_t n = 0; n < N; n += images)
    for (int64_t first = 0; first < extent; first += band) {
      Box box{{}, geometry.input, geometry.input, std::min(images, N - n)};
      box.first[axis] = first;
      box.count[axis] = std::min(band, extent - first);
      box.size[axis] = std::min(box.count[axis] + further, extent - first);
      const int64_t pixels = box.pixels() / box.images;
      source.look_at(box);
      for_units(box.images * panels, threads, [&](int64_t unit) {
        const int64_t image = unit % box.images, panel = unit / box.images, channel = panel % problem.panels * problem.width;
        const int64_t start = (panel * box.images + image) * pixels * problem.width;
        const int64_t count = std::min(problem.width, channels - channel);
        source.bring(n + image, panel / problem.panels, channel, count, right + start, problem.width);
        if (call.weight)
          kernel.weigh(right + start, left + start, pixels * problem.width, static_cast<R>(call.weight[n + image]));
      });
      if (!(box == planned)) {
        shifts = shifts_of(geometry, box);
        planned = box;
      }
      problem.pixels = box.pixels();
      for_units(panels * rows, threads, [&](int64_t unit) {
        kernel.tile(problem, unit / rows / problem.panels, unit % rows * kernel.rows, unit / rows % problem.panels);
      });
    }
}

void add_corners(const GramCall& call) {
  double sum = static_cast<double>(call.x.size(0));
  if (call.weight) {
    sum = 0;
    for (int64_t n = 0; n < call.x.size(0); ++n) sum += call.weight[n];
  }
  for (int64_t group = 0; group < call.groups; ++group)
    add_to(call.acc, (group + 1) * call.size * call.size - 1, call.scale * sum * product(call.geometry.positions));
}

template <class S>
void run(const GramCall& call) {
  const auto kernel = FISHERFAST_PICK(sym_kernel<S>)();
  const int route = forced_route;
  const int64_t channels = call.x.size(1) / call.groups;
  if (route == 0 ? shifts_are_cheaper(call.geometry, channels, {kernel.rows, kernel.lanes, kernel.vectors}) : route == 1) {
    run(call, Pixels<S>(call, kernel), kernel);
  } else {
    run(call, Patches<S>(call, kernel), kernel);
  }
}

void conv_gram(Tensor acc, Tensor x, double scale, OptionalTensor weight, bool bias, OptionalTensor flag,
               std::vector<int64_t> kernel, std::vector<int64_t> positions, std::vector<int64_t> stride,
               std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t groups) {
  if (stopped(flag, x, std::nullopt, weight)) return;
  const std::vector<int64_t> input = sizes_of(x);
  const auto value = [](const std::vector<int64_t>& values, std::size_t axis, int64_t absent) {
    return values.empty() ? absent : values[axis];
  };
  if (kernel.empty()) kernel.assign(input.size(), 1);
  for (std::size_t axis = 0; positions.size() < input.size(); ++axis) {
    const int64_t room = input[axis] + 2 * value(padding, axis, 0) - value(dilation, axis, 1) * (kernel[axis] - 1) - 1;
    positions.push_back(room < 0 ? 0 : room / value(stride, axis, 1) + 1);
  }
  const ConvGeometry geometry(input, positions, kernel, stride, padding, dilation);
  if (acc.numel() == 0 || product(geometry.positions) == 0) return;
  const GramCall call{x, geometry, groups, bias, data_or_null<const float>(weight), scale, sink_of(acc), acc.size(1)};
  if (bias) add_corners(call);
  if (x.numel() == 0) return;
  dispatch_input("conv_gram_", x.scalar_type(), [&](auto type) { run<typename decltype(type)::type>(call); });
}

// For tests: the route taken from now on, after setting it where a name is given.
std::string conv_gram_route(std::optional<std::string> force) {
  if (force) {
    int wanted = 0;
    while (wanted < 3 && *force != kRoutes[wanted]) ++wanted;
    if (wanted == 3) value_error("conv_gram_route: force must be cheapest, shifted or unfolded, got ", *force);
    forced_route = wanted;
  }
  return kRoutes[forced_route];
}

// For tests: what each route is taken to cost on AVX-512 in float32: [shifted, unfolded].
std::vector<int64_t> conv_gram_work(std::vector<int64_t> input, int64_t channels, std::vector<int64_t> kernel,
                                    std::vector<int64_t> positions, std::vector<int64_t> stride, std::vector<int64_t> padding,
                                    std::vector<int64_t> dilation) {
  const ConvGeometry geometry(input, positions, kernel, stride, padding, dilation);
  constexpr Block block{8, 16, 3};
  return {shifted_work(geometry, channels, block), unfolded_work(geometry, channels, block)};
}

}  // namespace
}  // namespace fisherfast

STABLE_TORCH_LIBRARY_FRAGMENT(fisherfast_cpp, m) {
  m.def(
      "conv_gram_(Tensor(a!) acc, Tensor x, float scale=1.0, *, Tensor? weight=None, bool bias=False, Tensor(b!)? flag=None, "
      "int[] kernel=[], int[] positions=[], int[] stride=[], int[] padding=[], int[] dilation=[], int groups=1) -> ()");
  m.def("conv_gram_route(str? force=None) -> str");
  m.def(
      "conv_gram_work(int[] input, int channels, int[] kernel, int[] positions, int[] stride, int[] padding, int[] dilation) -> "
      "int[]");
}
STABLE_TORCH_LIBRARY_IMPL(fisherfast_cpp, CPU, m) { m.impl("conv_gram_", TORCH_BOX(&fisherfast::conv_gram)); }
STABLE_TORCH_LIBRARY_IMPL(fisherfast_cpp, CompositeExplicitAutograd, m) {
  m.impl("conv_gram_route", TORCH_BOX(&fisherfast::conv_gram_route));
  m.impl("conv_gram_work", TORCH_BOX(&fisherfast::conv_gram_work));
}
