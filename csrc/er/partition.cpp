// How the ER loops are cut into work items, and how partial sums are merged.
#include "er/cache_shares.h"
#include "er/kernels.h"

namespace ernet::cpu {
namespace {

constexpr int64_t kSumElements = 16384;    // elements of a map in one channels-last item of weighted_sum
constexpr int64_t kRowElements = 2048;     // planar: samples share a slab up to this many elements of a channel
constexpr int64_t kSlabElements = 262144;  // channels-last: elements of a slab, about
constexpr int64_t kMaxSlabs = 64;          // bounds the partial results of a group
// The least cache that a channel tile is made for, where a CPU's share of the last-level cache has as much: smaller
// tiles for a second-level cache of 512 KiB alone were no faster, and a little slower for 7x7 maps.
constexpr int64_t kTileCache = int64_t{2} << 20;
constexpr int64_t kPlanarRun = 4096;  // planar: bytes that a channel tile has of a sample in one run, at least

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t at_least_one(int64_t a) { return a > 0 ? a : 1; }
int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }

// What a group is cut along: samples in the planar layout, pixels in channels-last.
int64_t group_units(const MapShape& s) {
  if (!s.channels_last) return s.per_sample ? 1 : s.N;
  return s.per_sample ? s.P : s.N * s.P;
}

int64_t slab_units(const MapShape& s) {
  const int64_t units = group_units(s);
  if (!s.channels_last) return at_least_one(at_most(kRowElements / at_least_one(s.P), units));
  const int64_t slabs = at_most(ceil_div(units * s.C, kSlabElements), kMaxSlabs);
  return at_least_one(ceil_div(units, at_least_one(slabs)));  // equal slabs: threads get equal shares
}

int64_t block_channels(const MapShape& s) {
  if (s.channels_last) return kPixelChannels;
  if (s.P > kPlaneChunk) return 1;
  return at_most(at_least_one(kPlanarElements / at_least_one(slab_units(s) * s.P)), kPlanarChannels);
}

int64_t channel_blocks(const MapShape& s) { return ceil_div(s.C, block_channels(s)); }

int64_t sum_pixels(const MapShape& s) { return at_least_one(kSumElements / at_least_one(s.C)); }

CacheShares shares_of(const CacheSizes& caches) {
  const int64_t last = at_most(caches.last, kTileCache), tile = caches.second > last ? caches.second : last;
  // A quarter of it is for what streams through. With half of the second-level cache for a gradient, that of a sum of
  // maps was 3 % faster than with an eighth, where it has 512 KiB; with more it was no faster than that.
  return {tile / 4 * 3, caches.second / 2};
}

}  // namespace

const CacheShares& cache_shares() {
  static const CacheShares shares = shares_of(cache_sizes());
  return shares;
}

int64_t bit_row_bytes(const MapShape& s) { return ceil_div(s.channels_last ? s.C : s.P, 64) * 8; }

int64_t bit_bytes(const MapShape& s) { return s.N * (s.channels_last ? s.P : s.C) * bit_row_bytes(s) + kBitsPast; }

int64_t slabs_per_group(const MapShape& s) { return ceil_div(group_units(s), slab_units(s)); }

int64_t reduce_items(const MapShape& s) { return s.groups() * slabs_per_group(s) * channel_blocks(s); }

ReduceItem reduce_item(const MapShape& s, int64_t item) {
  const int64_t blocks = channel_blocks(s), width = block_channels(s), channel = (item % blocks) * width;
  return slab_item(s, item / blocks, channel, at_most(width, s.C - channel));
}

ReduceItem slab_item(const MapShape& s, int64_t slab, int64_t channel, int64_t channels) {
  const int64_t slabs = slabs_per_group(s), begin = (slab % slabs) * slab_units(s);
  return {slab, (slab / slabs) * group_units(s) + begin, at_most(slab_units(s), group_units(s) - begin), channel,
          channels};
}

int64_t reduce_channels(const MapShape& s) { return block_channels(s); }

int64_t tile_channels(const MapShape& s, int64_t num_maps, int64_t element_size) {
  if (s.channels_last || s.per_sample)
    return s.C;  // a tile's runs would lie a power of two apart and share a few sets of the cache
  const int64_t channel_bytes = at_least_one(s.N * s.P * element_size);
  const int64_t tile_bytes = cache_shares().channel_tile;
  // A map that was read in the pass before is still there if all that has come since leaves room for it.
  const int64_t fits = tile_bytes / (channel_bytes * (num_maps + 2));
  const int64_t run = ceil_div(kPlanarRun, at_least_one(s.P * element_size));
  int64_t channels = 1;
  while (channels * 2 <= fits) channels *= 2;
  while (channels < run) channels *= 2;
  return channels * channel_bytes * 3 > tile_bytes ? s.C : at_most(channels, s.C);
}

int64_t slab_elements(const MapShape& s, int64_t slab) {
  const int64_t units = at_most(slab_units(s), group_units(s) - slab * slab_units(s));
  return s.channels_last ? units : units * s.P;
}

int64_t sum_items(const MapShape& s) { return s.channels_last ? s.N * ceil_div(s.P, sum_pixels(s)) : s.N * s.C; }

PixelRange sum_item(const MapShape& s, int64_t item) {
  if (!s.channels_last) return {s.per_sample ? item / s.C : 0, item * s.P, s.P};
  const int64_t runs = ceil_div(s.P, sum_pixels(s)), n = item / runs, begin = (item % runs) * sum_pixels(s);
  const int64_t left = s.P - begin;
  return {s.per_sample ? n : 0, n * s.P + begin, left < sum_pixels(s) ? left : sum_pixels(s)};
}

int64_t item_elements(const MapShape& s, bool reduction) {
  if (!reduction) return at_least_one(s.channels_last ? sum_pixels(s) * s.C : s.P);
  return at_least_one(slab_elements(s, 0) * at_most(block_channels(s), s.C));
}

// Chan's update: two sets of count, mean and sum of squared deviations become one. Slabs are merged into the first one,
// all channels at a time.
template <typename A> void merge(const ChannelMoments& args, const ChannelTile& tile, A* mean, A* var) {
  const MapShape& s = args.shape;
  const int64_t slabs = slabs_per_group(s);
  for (int64_t group = 0; group < s.groups(); ++group) {
    double* first = args.partial + group * slabs * 2 * s.C;
    double count = slabs > 0 ? static_cast<double>(slab_elements(s, 0)) : 0;
    for (int64_t slab = 1; slab < slabs; ++slab) {
      const double* part = first + slab * 2 * s.C;
      const double n = static_cast<double>(slab_elements(s, slab)), total = count + n;
      const double weight = n / total, spread = count * weight;
      for (int64_t c = tile.begin; c < tile.end; ++c) {
        const double delta = part[c] - first[c];
        first[c] += delta * weight;
        first[s.C + c] += part[s.C + c] + delta * delta * spread;
      }
      count = total;
    }
    for (int64_t c = tile.begin; c < tile.end; ++c) {  // no values: 0 / 0 = NaN, as torch.var gives
      mean[group * s.C + c] = count > 0 ? static_cast<A>(first[c]) : A(0);
      var[group * s.C + c] = static_cast<A>((count > 0 ? first[s.C + c] : 0) / count);
    }
  }
}

namespace {

// Slabs are added to the first one of their group, whose rows become sums [rows][groups][C]; the last row goes to
// `last`, if that is given.
template <typename A>
void merge_sums(double* partial, const MapShape& s, int64_t rows, const ChannelTile& tile, A* sums, A* last) {
  const int64_t slabs = slabs_per_group(s);
  for (int64_t group = 0; group < s.groups(); ++group) {
    double* const first = partial + group * slabs * rows * s.C;
    for (int64_t slab = 1; slab < slabs; ++slab) {
      const double* part = first + slab * rows * s.C;
      for (int64_t row = 0; row < rows; ++row) {
        for (int64_t c = tile.begin; c < tile.end; ++c) first[row * s.C + c] += part[row * s.C + c];
      }
    }
    for (int64_t row = 0; row < rows; ++row) {
      A* const out = last != nullptr && row == rows - 1 ? last + group * s.C : sums + (row * s.groups() + group) * s.C;
      for (int64_t c = tile.begin; c < tile.end; ++c) out[c] = slabs > 0 ? static_cast<A>(first[row * s.C + c]) : A(0);
    }
  }
}

}  // namespace

template <typename A> void merge(const MapDots& args, const ChannelTile& tile, A* sums, A* last) {
  merge_sums(args.partial, args.shape, args.rows(), tile, sums, last);
}

template <typename A> void merge(const SumDots& args, const ChannelTile& tile, A* sums, A*) {
  merge_sums<A>(args.partial, args.shape, args.rows(), tile, sums, nullptr);
}

template void merge<float>(const ChannelMoments&, const ChannelTile&, float*, float*);
template void merge<double>(const ChannelMoments&, const ChannelTile&, double*, double*);
template void merge<float>(const MapDots&, const ChannelTile&, float*, float*);
template void merge<double>(const MapDots&, const ChannelTile&, double*, double*);
template void merge<double>(const SumDots&, const ChannelTile&, double*, double*);

}  // namespace ernet::cpu
