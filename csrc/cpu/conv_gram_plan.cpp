// SPDX-License-Identifier: Apache-2.0
#include "cpu/conv_gram_plan.h"

#include <algorithm>
#include <cmath>
#include <map>

namespace fisherfast {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return a >= 0 ? (a + b - 1) / b : -(-a / b); }

// Pixels first, first + stride, ... of one axis, and the offsets k whose windows hold them all.
struct Piece {
  int64_t first, count;
  std::vector<int64_t> offsets;
};

// Of pixels q in [begin, end) with q + shift in x: the pieces into which the windows of one residue are cut.
void cut(const ConvGeometry& geometry, int axis, int64_t residue, const std::vector<int64_t>& offsets, int64_t begin, int64_t end,
         std::vector<Piece>& pieces) {
  const int64_t stride = geometry.stride[axis], P = geometry.positions[axis];
  const auto window = [&](int64_t k) { return (k * geometry.dilation[axis] - geometry.padding[axis] - residue) / stride; };
  const int64_t low = ceil_div(begin - residue, stride), high = ceil_div(end - residue, stride);
  std::vector<int64_t> bounds{low, high};
  for (const int64_t k : offsets) {
    bounds.push_back(std::clamp(window(k), low, std::max(low, high)));
    bounds.push_back(std::clamp(window(k) + P, low, std::max(low, high)));
  }
  std::sort(bounds.begin(), bounds.end());
  for (std::size_t i = 1; i < bounds.size() && low < high; ++i) {
    const int64_t first = bounds[i - 1], count = bounds[i] - first;
    Piece piece{residue + first * stride, count, {}};
    for (const int64_t k : offsets)
      if (window(k) <= first && first < window(k) + P) piece.offsets.push_back(k);
    if (count > 0 && !piece.offsets.empty()) pieces.push_back(piece);
  }
}

// All pieces of one axis for the shift by D offsets, of pixels q in [first, first + count).
std::vector<Piece> pieces_of(const ConvGeometry& geometry, int axis, int64_t D, int64_t first, int64_t count) {
  const int64_t stride = geometry.stride[axis], shift = D * geometry.dilation[axis];
  const int64_t begin = std::max(first, -shift),
                end = std::min({first + count, geometry.input[axis], geometry.input[axis] - shift});
  std::map<int64_t, std::vector<int64_t>> residues;
  for (int64_t k = std::max<int64_t>(0, -D); k < geometry.kernel[axis] - std::max<int64_t>(0, D); ++k) {
    const int64_t start = k * geometry.dilation[axis] - geometry.padding[axis];
    residues[(start % stride + stride) % stride].push_back(k);
  }
  std::vector<Piece> pieces;
  for (const auto& [residue, offsets] : residues) cut(geometry, axis, residue, offsets, begin, end, pieces);
  return pieces;
}

// Adds runs to a region and cuts them into chains. Chains as long as there are of them would be the most exact.
class Runs {
 public:
  Runs(Region& region, int64_t step) : region_(region), step_(step) {}

  void add(int64_t first, int64_t count) {
    if (!whole_.empty() && whole_.back().first + whole_.back().count * step_ == first) {
      whole_.back().count += count;
    } else {
      whole_.push_back({first, count});
    }
  }

  void finish() {
    int64_t total = 0, length = 0;
    for (const Run& run : whole_) total += run.count;
    const int64_t longest = std::clamp<int64_t>(2 * std::sqrt(total), kShortChain, kLongChain);
    region_.chains.push_back(0);
    for (const Run& run : whole_)
      for (int64_t done = 0, count = 0; done < run.count; done += count) {
        count = std::min(run.count - done, longest - length);
        region_.runs.push_back({run.first + done * step_, count});
        length += count;
        if (length == longest) {
          region_.chains.push_back(static_cast<int64_t>(region_.runs.size()));
          length = 0;
        }
      }
    if (length > 0) region_.chains.push_back(static_cast<int64_t>(region_.runs.size()));
  }

 private:
  Region& region_;
  int64_t step_;
  std::vector<Run> whole_;
};

Region region_of(const ConvGeometry& geometry, const Box& box, const Piece& a, const Piece& b, const Piece& c) {
  Region region;
  Runs runs(region, geometry.stride[2]);
  const Axes& size = box.size;
  for (int64_t image = 0; image < box.images; ++image)
    for (int64_t i = 0; i < a.count; ++i)
      for (int64_t j = 0; j < b.count; ++j) {
        const int64_t at[] = {a.first + i * geometry.stride[0] - box.first[0], b.first + j * geometry.stride[1] - box.first[1]};
        runs.add(((image * size[0] + at[0]) * size[1] + at[1]) * size[2] + c.first - box.first[2], c.count);
      }
  runs.finish();
  return region;
}

// body(D) for the shifts that do not go back.
template <class Body>
void for_shifts(const ConvGeometry& geometry, const Body& body) {
  const Axes& K = geometry.kernel;
  for (int64_t a = 0; a < K[0]; ++a)
    for (int64_t b = a == 0 ? 0 : 1 - K[1]; b < K[1]; ++b)
      for (int64_t c = a == 0 && b == 0 ? 0 : 1 - K[2]; c < K[2]; ++c) body(Axes{a, b, c});
}

// Pixels in all pieces.
int64_t count(const std::vector<Piece>& pieces) {
  int64_t sum = 0;
  for (const Piece& piece : pieces) sum += piece.count;
  return sum;
}

// The tiles of a symmetric product of so many channels, or of one that has no symmetry, and what a pixel costs in all of them.
struct Product {
  int64_t tiles, pixel;
};

Product product_of(int64_t channels, const Block& block, bool symmetric) {
  constexpr int64_t kStep = 5, kLeast = 14;  // from one pixel to the next; of a tile too narrow to hide its loads
  const int64_t width = panel_vectors(channels, block.rows, block.lanes, block.vectors) * block.lanes;
  Product product{};
  for (int64_t row = 0; row < channels; row += block.rows)
    for (int64_t column = 0; column < channels; column += width) {
      const int64_t columns = std::min(width, channels - column);
      if (symmetric && column + columns <= row) continue;
      ++product.tiles;
      product.pixel += std::max(kLeast, block.rows * ceil_div(columns, block.lanes) + kStep);
    }
  return product;
}

}  // namespace

int64_t band_axis(const ConvGeometry& geometry) { return geometry.input[0] > 1 ? 0 : geometry.input[1] > 1 ? 1 : 2; }

std::vector<Shift> shifts_of(const ConvGeometry& geometry, const Box& box) {
  const Axes& K = geometry.kernel;
  std::vector<Shift> shifts;
  for_shifts(geometry, [&](const Axes& D) {
    std::vector<Piece> pieces[3];
    for (int a = 0; a < 3; ++a) pieces[a] = pieces_of(geometry, a, D[a], box.first[a], box.count[a]);
    Shift shift{};
    for (int a = 0; a < 3; ++a) shift.pixels = shift.pixels * box.size[a] + D[a] * geometry.dilation[a];
    const int64_t further = (D[0] * K[1] + D[1]) * K[2] + D[2];
    std::map<int64_t, int64_t> places;  // of offsets k among the targets
    for (const Piece& a : pieces[0])
      for (const Piece& b : pieces[1])
        for (const Piece& c : pieces[2]) {
          Region region = region_of(geometry, box, a, b, c);
          for (const int64_t i : a.offsets)
            for (const int64_t j : b.offsets)
              for (const int64_t l : c.offsets) {
                const int64_t k = (i * K[1] + j) * K[2] + l;
                const auto [place, fresh] = places.emplace(k, static_cast<int64_t>(shift.targets.size()));
                if (fresh) shift.targets.push_back({k, k + further});
                region.targets.push_back(place->second);
              }
          shift.regions.push_back(std::move(region));
        }
    if (!shift.regions.empty()) shifts.push_back(std::move(shift));
  });
  return shifts;
}

int64_t shifted_work(const ConvGeometry& geometry, int64_t channels, const Block& block) {
  constexpr int64_t kBring = 48, kBringPart = 80;  // a vector of channels, transposed; the last one, element by element
  constexpr int64_t kRun = 16, kPlan = 48;         // a run, in a tile and before
  const Product square = product_of(channels, block, false), triangle = product_of(channels, block, true);
  int64_t work = product(geometry.input) * (channels / block.lanes * kBring + (channels % block.lanes ? kBringPart : 0));
  for_shifts(geometry, [&](const Axes& D) {
    int64_t pixels = 1, runs = 1;
    for (int a = 0; a < 3; ++a) {
      const std::vector<Piece> pieces = pieces_of(geometry, a, D[a], 0, geometry.input[a]);
      pixels *= count(pieces);
      runs *= a < 2 ? count(pieces) : static_cast<int64_t>(pieces.size());
    }
    const Product& product = D == Axes{} ? triangle : square;
    work += pixels * product.pixel + runs * (kRun * product.tiles + kPlan);
  });
  return work;
}

int64_t unfolded_work(const ConvGeometry& geometry, int64_t channels, const Block& block) {
  constexpr int64_t kBring = 7;  // an element of a patch
  const int64_t columns = channels * product(geometry.kernel);
  return product(geometry.positions) * (kBring * columns + product_of(columns, block, true).pixel);
}

bool shifts_are_cheaper(const ConvGeometry& geometry, int64_t channels, const Block& block) {
  return shifted_work(geometry, channels, block) <= unfolded_work(geometry, channels, block);
}

}  // namespace fisherfast
