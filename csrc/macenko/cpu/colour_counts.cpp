#include "macenko/cpu/image.h"

#include <algorithm>
#include <vector>

#include "macenko/steps/order_statistic.h"

namespace ernet::cpu {

namespace {

using macenko::OdTable;
using macenko::Ranks;

// Calls body(red, green, blue, count) for every colour that occurs.
template <class F> void for_each_colour(const int64_t* counts, const F& body) {
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

double percentile(std::vector<CountedKey>& keys, double percent, bool nearest, bool angles) {
  std::sort(keys.begin(), keys.end(), [](const CountedKey& a, const CountedKey& b) { return a.key < b.key; });
  int64_t pixels = 0;
  for (const CountedKey& key : keys) pixels += key.count;
  const Ranks ranks = macenko::percentile_ranks(pixels, percent, nearest);
  int64_t below = 0;
  auto key = keys.begin();
  while (below + key->count <= ranks.lower) below += (key++)->count;
  double lower = key->key;
  double upper = below + key->count > ranks.upper ? lower : (key + 1)->key;
  if (angles) {
    lower = macenko::angle_of_key(lower);
    upper = macenko::angle_of_key(upper);
  }
  return macenko::interpolate(lower, upper, ranks.weight);
}

// Key a (0) or b (1) of every colour, or every tissue colour, by the loops that give them to pixels: instruction sets
// may round differently, and the result is to be that of the image.
void find_keys(const int64_t* counts, const Keys& keys, int which, std::vector<CountedKey>& found) {
  constexpr int kStaged = 512;
  uint8_t levels[3 * kStaged];
  int staged = 0;
  const auto flush = [&] {
    double key[2][kStaged];
    macenko_loops(Pixel::u8).keys({levels, 3, 1, staged, 1.0}, keys, key[0], key[1]);
    CountedKey* last = found.data() + found.size() - staged;
    for (int i = 0; i < staged; ++i) last[i].key = key[which][i];
    staged = 0;
  };
  found.clear();
  for_each_colour(counts, [&](int red, int green, int blue, int64_t count) {
    if (keys.kind == KeyKind::angle && !is_tissue(red, green, blue, *keys.table)) return;
    const int level[3] = {red, green, blue};
    for (int k = 0; k < 3; ++k) levels[3 * staged + k] = uint8_t(level[k]);
    found.push_back({0, count});
    if (++staged == kStaged) flush();
  });
  flush();
}

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
      if (i == 0 || !angles) find_keys(counts, keys, i, found);
      result[i] = percentile(found, percent[i], p.nearest, angles);
    }
  });
}

}  // namespace ernet::cpu
