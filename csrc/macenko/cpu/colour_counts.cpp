#include "macenko/cpu/image.h"

#include <algorithm>
#include <vector>

#include "macenko/steps/order_statistic.h"

namespace ernet::cpu {

namespace {

using macenko::OdTable;
using macenko::Ranks;

// Calls body(red, green, blue, count) for every colour that occurs.
template <class F>
void for_each_colour(const int64_t* counts, const F& body) {
  for (int64_t colour = 0; colour < kColours; ++colour) {
    if (counts[colour] > 0) body(int(colour & 255), int(colour >> 8 & 255), int(colour >> 16), counts[colour]);
  }
}

bool is_tissue(int red, int green, int blue, const OdTable& table) {
  return std::max(red, std::max(green, blue)) <= table.tissue_limit;
}

// The integers that `macenko_moments` sums pixel by pixel.
void moments_of_colours(const int64_t* counts, const OdTable& table, double moments[macenko::kMomentCount]) {
  int64_t pixels = 0;
  uint128 sum[3] = {};
  uint128 product[6] = {};
  for_each_colour(counts, [&](int red, int green, int blue, int64_t count) {
    if (!is_tissue(red, green, blue, table)) return;
    pixels += count;
    const int64_t od[3] = {table.fixed[red], table.fixed[green], table.fixed[blue]};
    int k = 0;
    for (int i = 0; i < 3; ++i) {
      sum[i] += uint128(count) * uint128(od[i]);
      for (int j = i; j < 3; ++j) product[k++] += uint128(count) * uint128(od[i] * od[j]);
    }
  });
  moments_of_sums(pixels, sum, product, moments);
}

struct CountedKey {
  double key;
  int64_t count;
};

// Both order statistics of a percentile over the pixels that have keys.
struct OrderStatistics {
  double lower;
  double upper;
  double weight;
};

OrderStatistics select(std::vector<CountedKey>& keys, double percent, bool nearest) {
  std::sort(keys.begin(), keys.end(), [](const CountedKey& a, const CountedKey& b) { return a.key < b.key; });
  int64_t pixels = 0;
  for (const CountedKey& key : keys) pixels += key.count;
  const Ranks ranks = macenko::percentile_ranks(pixels, percent, nearest);
  OrderStatistics found = {keys.back().key, keys.back().key, ranks.weight};
  int64_t below = 0;
  auto key = keys.begin();
  while (below + key->count <= ranks.lower) below += (key++)->count;
  found.lower = key->key;
  found.upper = below + key->count > ranks.upper ? key->key : (key + 1)->key;
  return found;
}

// Gives every colour, or every tissue colour, its keys, by the loops that give them to pixels: instruction sets may
// round differently, and the result is to be that of the image.
class ColourKeys {
 public:
  ColourKeys(const int64_t* counts, const Keys& keys) : counts_(counts), keys_(keys) {}

  // Key a (0) or b (1).
  void find(int which, std::vector<CountedKey>& found) {
    found.clear();
    const bool tissue_only = keys_.kind == KeyKind::angle;
    for_each_colour(counts_, [&](int red, int green, int blue, int64_t count) {
      if (tissue_only && !is_tissue(red, green, blue, *keys_.table)) return;
      const int level[3] = {red, green, blue};
      for (int k = 0; k < 3; ++k) levels_[3 * staged_ + k] = uint8_t(level[k]);
      found.push_back({0, count});
      if (++staged_ == kStaged) flush(which, found);
    });
    flush(which, found);
  }

 private:
  static constexpr int kStaged = 512;

  void flush(int which, std::vector<CountedKey>& found) {
    double key[2][kStaged];
    const ImageView image = {levels_, 3, 1, staged_, 1.0};
    macenko_loops(Pixel::u8).keys(image, keys_, key[0], key[1]);
    CountedKey* last = found.data() + found.size() - staged_;
    for (int i = 0; i < staged_; ++i) last[i].key = key[which][i];
    staged_ = 0;
  }

  const int64_t* counts_;
  const Keys& keys_;
  uint8_t levels_[3 * kStaged];
  int staged_ = 0;
};

}  // namespace

void macenko_count_colours(const ImageView& image, int64_t* counts) {
  const auto* red = static_cast<const uint8_t*>(image.data);
  const uint8_t* green = red + image.channel_stride;
  const uint8_t* blue = green + image.channel_stride;
  for (int64_t i = 0; i < image.pixels; ++i) {
    const int64_t at = i * image.pixel_stride;
    ++counts[int64_t(red[at]) | int64_t(green[at]) << 8 | int64_t(blue[at]) << 16];
  }
}

MacenkoImageFit macenko_fit_colours(const int64_t* counts, const MacenkoParameters& p, const OdTable& table) {
  double moments[macenko::kMomentCount];
  moments_of_colours(counts, table, moments);
  std::vector<CountedKey> found;
  return fit_of_moments(moments, p, table, [&](const Keys& keys, const double percent[2], double result[2]) {
    const bool angles = keys.kind == KeyKind::angle;
    for (int i = 0; i < 2; ++i) {
      if (i == 0 || !angles) ColourKeys(counts, keys).find(i, found);
      const OrderStatistics at = select(found, percent[i], p.nearest);
      result[i] =
          angles ? macenko::interpolate(macenko::angle_of_key(at.lower), macenko::angle_of_key(at.upper), at.weight)
                 : macenko::interpolate(at.lower, at.upper, at.weight);
    }
  });
}

}  // namespace ernet::cpu
